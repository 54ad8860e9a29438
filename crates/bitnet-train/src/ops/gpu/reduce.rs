//! Sums and maxima over a row by the units of one cube.
//!
//! Every unit adds up what the others have left in shared memory, in two stages where
//! they are many: two or three barriers, always in the same order.

use burn_cubecl::cubecl;
use cubecl::prelude::*;

/// Units up to which one stage does.
const FEW: u32 = 32;

/// Units that add up in the first of two stages, and sums of the second.
const GROUPS: u32 = 16;

/// Values of shared memory that a reduction by `units` units takes.
pub(super) const fn scratch_len(units: u32) -> usize {
    (units + GROUPS) as usize
}

/// The sum of every unit's value.
#[cube]
pub(super) fn cube_sum(value: f32, scratch: &mut Shared<[f32]>, #[comptime] units: u32) -> f32 {
    scratch[UNIT_POS as usize] = value;
    sync_cube();
    let total = if comptime!(units <= FEW) {
        sum_of(scratch, 0, units)
    } else {
        if UNIT_POS < GROUPS {
            let group = comptime!(units / GROUPS);
            let sum = sum_of(scratch, (UNIT_POS * group) as usize, group);
            scratch[(units + UNIT_POS) as usize] = sum;
        }
        sync_cube();
        sum_of(scratch, units as usize, GROUPS)
    };
    sync_cube();
    total
}

#[cube]
fn sum_of(scratch: &mut Shared<[f32]>, first: usize, #[comptime] len: u32) -> f32 {
    let mut sum = scratch[first];
    for i in 1..len {
        sum += scratch[first + i as usize];
    }
    sum
}

/// The largest of every unit's values.
#[cube]
pub(super) fn cube_max(value: f32, scratch: &mut Shared<[f32]>, #[comptime] units: u32) -> f32 {
    scratch[UNIT_POS as usize] = value;
    sync_cube();
    let top = if comptime!(units <= FEW) {
        max_of(scratch, 0, units)
    } else {
        if UNIT_POS < GROUPS {
            let group = comptime!(units / GROUPS);
            let top = max_of(scratch, (UNIT_POS * group) as usize, group);
            scratch[(units + UNIT_POS) as usize] = top;
        }
        sync_cube();
        max_of(scratch, units as usize, GROUPS)
    };
    sync_cube();
    top
}

#[cube]
fn max_of(scratch: &mut Shared<[f32]>, first: usize, #[comptime] len: u32) -> f32 {
    let mut top = scratch[first];
    for i in 1..len {
        top = max(top, scratch[first + i as usize]);
    }
    top
}
