//! The ledger of the fused halves of a block: `attention_layer` and `feed_forward` of
//! bitnet-train's `ops`, whose buffers wait to be used again.

use super::{ACTIVATIONS, F32, GRADIENTS, Ledger, Walk};
use crate::Layout;
use crate::names::Linear;

/// Tokens of a round of the feed-forward network's backward pass.
const ROUND: u64 = 1024;

const ATTENTION: [Linear; 4] = [Linear::Q, Linear::K, Linear::V, Linear::O];
const FEED_FORWARD: [Linear; 3] = [Linear::Gate, Linear::Up, Linear::Down];

impl Walk<'_> {
    /// Whether one operation computes each half of a block.
    pub(super) fn is_fused(&self) -> bool {
        Linear::ALL.iter().all(|&which| {
            let form = self.form(which);
            let all = !self.model.rotates(which) && self.model.keeps(which) == 1.0;
            all && (form.integer || form.float)
        })
    }

    fn is_integer(&self, which: Linear) -> bool {
        self.form(which).integer
    }

    /// The packed codes of some layers, each a buffer; none of floats.
    fn codes(&self, layers: &[Linear]) -> Vec<u64> {
        let integer = layers.iter().filter(|&&which| self.is_integer(which));
        let bytes = integer.map(|which| {
            let [rows, cols] = which.shape(self.model);
            (rows * Layout::P2.row_bytes(cols)) as u64
        });
        bytes.collect()
    }

    /// The input of a layer as it is multiplied: integers or floats.
    fn input(&self, which: Linear) -> u64 {
        let [_, cols] = which.shape(self.model);
        if !self.is_integer(which) {
            return self.rows(cols as u64);
        }
        // Padded for any layout.
        let stride = Layout::ALL.iter().map(|l| l.padded_cols(cols)).max().unwrap_or(cols);
        self.n * stride as u64
    }

    /// What half a block saves in buffers that wait afterwards.
    fn saved(&self, layers: &[Linear]) -> Vec<u64> {
        let mut all = self.codes(layers);
        all.extend([self.input(layers[0]), self.input(layers[layers.len() - 1])]);
        if layers == ATTENTION {
            all.push(self.rows(self.q + 2 * self.kv));
            if self.model.sub_norms {
                all.push(self.rows(self.q));
            }
        } else if !self.is_integer(Linear::Gate) {
            all.push(2 * self.rows(self.f));
        }
        all
    }

    /// See [`Walk::block_forward`].
    pub(super) fn fused_forward(&self, l: &mut Ledger, tracked: bool) {
        let hidden = self.rows(self.d);
        for half in [&ATTENTION[..], &FEED_FORWARD] {
            let saved = self.saved(half);
            saved.iter().for_each(|&bytes| l.take(ACTIVATIONS, bytes));
            if half == ATTENTION && !self.model.sub_norms {
                l.take(ACTIVATIONS, self.rows(self.q));
                l.give(ACTIVATIONS, self.rows(self.q));
            }
            l.hold(ACTIVATIONS, hidden);
            if !tracked {
                saved.iter().for_each(|&bytes| l.give(ACTIVATIONS, bytes));
            }
        }
        if !tracked {
            // What lies between the halves.
            l.free(ACTIVATIONS, hidden);
        }
    }

    /// See [`Walk::block_backward`].
    pub(super) fn fused_backward(&self, l: &mut Ledger) {
        let hidden = self.rows(self.d);
        let bytes = |rows: u64, cols: u64| F32 * rows * cols.next_multiple_of(16);
        let weights = |layers: &[Linear]| -> Vec<u64> {
            let shape = |which: &Linear| which.shape(self.model).map(|x| x as u64);
            layers.iter().map(shape).map(|[rows, cols]| bytes(rows, cols)).collect()
        };
        for half in [&FEED_FORWARD[..], &ATTENTION] {
            let width = if half == ATTENTION { self.q } else { self.f };
            // Weights and inputs as right operands, and gradients between products.
            let mut buffers = weights(half);
            if half == ATTENTION {
                let qkv = self.q + 2 * self.kv;
                buffers.extend([bytes(self.n, self.d), bytes(self.n, width)]);
                buffers.extend([self.rows(qkv), self.rows(self.q)]);
            } else {
                let round = self.n.min(ROUND);
                buffers.extend([bytes(round, self.d), bytes(round, width)]);
                buffers.push(2 * F32 * round * width);
            }
            l.hold(ACTIVATIONS, hidden);
            buffers.iter().for_each(|&bytes| l.take(ACTIVATIONS, bytes));
            for which in half {
                let [rows, cols] = which.shape(self.model).map(|x| x as u64);
                l.hold(GRADIENTS, F32 * rows * cols);
            }
            buffers.iter().for_each(|&bytes| l.give(ACTIVATIONS, bytes));
            self.saved(half).into_iter().for_each(|bytes| l.give(ACTIVATIONS, bytes));
            // The half's input, and the gradient of its output.
            l.free(ACTIVATIONS, 2 * hidden);
        }
    }
}
