//! Speed of the kernels beside the limits of the machine: packed products of one
//! token against read bandwidth, products of many tokens against the peak of the
//! int8 instruction, and the float operations in elements per second.
//!
//! Medians of interleaved runs (with `--best` the fastest, for a machine that is
//! busy with other work); limits are measured in the same process.
//! `cargo bench -p bitnet-kernels -- [gemv|gemm|product|fixed|float] [--best]`

use std::hint::black_box;
use std::time::{Duration, Instant};

use bitnet_core::{Activation, Layout};
use bitnet_kernels::{
    AdamW, AttendQuery, DenseRows, Digits, FIXED_DEPTH, Kernels, KvHead, KvHeadInt8Mut, Line,
    LineAllocator, MOMENT_BLOCK, MatMut, MatRef, MomentsMut, PACK_DEPTH, PackSource, PackedActs,
    PackedRef, QuantizedTokens, TernaryRows, Unit, attend_scores_len, key_blocks_len, packed_len,
    store_key,
};
use half::f16;

/// As in the programs.
#[global_allocator]
static ALLOCATOR: LineAllocator = LineAllocator;

/// A name and what is timed under it.
type Run<'a> = (String, Box<dyn FnMut() + 'a>);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| {
        let names: Vec<_> = args.iter().filter(|a| !a.starts_with('-')).collect();
        names.is_empty() || names.iter().any(|a| name.contains(a.as_str()))
    };
    if wanted("gemv") {
        gemv();
    }
    if wanted("gemm") {
        gemm();
    }
    if wanted("product") {
        product();
    }
    if wanted("fixed") {
        fixed();
    }
    if wanted("float") {
        float();
    }
}

/// The median (or best) time of each of some runs, taken in turns for `budget`.
fn medians(budget: Duration, runs: &mut [Run<'_>]) -> Vec<f64> {
    let best = std::env::args().any(|arg| arg == "--best");
    let mut times = vec![Vec::new(); runs.len()];
    runs.iter_mut().for_each(|(_, run)| run());
    let start = Instant::now();
    while start.elapsed() < budget || times[0].len() < 5 {
        for ((_, run), times) in runs.iter_mut().zip(&mut times) {
            // Once untimed, so that no run pays for what the one before it evicted.
            run();
            let start = Instant::now();
            run();
            times.push(start.elapsed().as_secs_f64());
        }
    }
    times
        .into_iter()
        .map(|mut t| {
            t.sort_by(f64::total_cmp);
            if best { t[0] } else { t[t.len() / 2] }
        })
        .collect()
}

/// Bytes that are not all alike.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&(state >> 16).to_le_bytes()[..4]);
    }
    out.truncate(len);
    out
}

/// Valid packed bytes (no code 3) of a layout.
fn packed(layout: Layout, len: usize) -> Vec<u8> {
    let mut bytes = noise(len);
    match layout {
        Layout::P2 => bytes.iter_mut().for_each(|b| *b &= !((*b >> 1) & 0x55)),
        Layout::P5 => bytes.iter_mut().for_each(|b| *b = (*b).min(242)),
    }
    bytes
}

fn tokens(count: usize, cols: usize) -> QuantizedTokens {
    let mut x = QuantizedTokens::default();
    x.resize(count, cols);
    let q = noise(count * cols);
    for t in 0..count {
        let at = t * x.stride;
        for (q, &b) in x.q[at..at + cols].iter_mut().zip(&q[t * cols..]) {
            *q = b as i8;
        }
        x.sums[t] = x.q[at..at + cols].iter().map(|&q| i32::from(q)).sum();
        x.scales[t] = 0.01;
    }
    x
}

/// Runs `job` on each part of `0..rows` in a thread of its own and waits.
fn split(threads: usize, rows: usize, job: impl Fn(usize, usize) + Sync) {
    if threads == 1 {
        return job(0, rows);
    }
    std::thread::scope(|s| {
        for i in 0..threads {
            let job = &job;
            s.spawn(move || job(i * rows / threads, (i + 1) * rows / threads));
        }
    });
}

/// One token: weights a second, beside reading as many packed bytes.
fn gemv() {
    println!("ternary product of one token, K = 2560 (Gweights/s; share of reading as fast)");
    let kernels = Kernels::all();
    let sizes = [4_000_000, 96_000_000, 480_000_000];
    for (weights, layout) in sizes.into_iter().flat_map(|w| Layout::ALL.map(|l| (w, l))) {
        let cols = 2560;
        let rows = weights / cols;
        let bytes = packed(layout, rows * layout.row_bytes(cols));
        let x = tokens(1, cols);
        // Small matrices are run several times, so that starting threads is no part.
        let repeat = (96_000_000 / weights).max(1);
        for threads in [1, 2] {
            let mut runs: Vec<Run<'_>> = Vec::new();
            runs.push((
                "read".into(),
                Box::new(|| {
                    split(threads, rows, |from, to| {
                        let row = layout.row_bytes(cols);
                        for _ in 0..repeat {
                            let bytes = black_box(&bytes[from * row..to * row]);
                            black_box(Kernels::detect().read_probe(bytes));
                        }
                    });
                }),
            ));
            for &k in kernels
                .iter()
                .filter(|k| weights < 90_000_000 || ["avx512vbmi", "avx2"].contains(&k.name()))
            {
                let (bytes, x) = (&bytes, &x);
                let w = TernaryRows { layout, cols, weight_scale: 0.5, bytes };
                runs.push((
                    k.name().into(),
                    Box::new(move || {
                        split(threads, rows, |from, to| {
                            let mut out = vec![0f32; to - from];
                            for _ in 0..repeat {
                                let out = MatMut::new(&mut out, 1, to - from);
                                k.ternary_matmul(w.rows(from, to), black_box(x.view()), out);
                            }
                            black_box(&out);
                        });
                    }),
                ));
            }
            let times = medians(Duration::from_secs(2), &mut runs);
            let line: Vec<String> = runs
                .iter()
                .zip(&times)
                .map(|((name, _), t)| {
                    let rate = (rows * cols * repeat) as f64 / t * 1e-9;
                    format!("{name} {rate:.1} ({:.0}%)", 100.0 * times[0] / t)
                })
                .collect();
            println!(
                "  {:>4}M {}, {threads} threads: {}",
                weights / 1_000_000,
                layout.name(),
                line.join(", ")
            );
        }
    }
}

/// Many tokens: multiply-adds a second, beside the peak of the fastest set.
fn gemm() {
    println!("ternary product of T tokens, one thread (GMAC/s, share of the int8 peak)");
    let kernels = Kernels::all();
    for (cols, rows, count) in [
        (2560, 2560, 2),
        (2560, 2560, 4),
        (2560, 2560, 7),
        (2560, 2560, 8),
        (6912, 2560, 8),
        (2560, 2560, 16),
        (2560, 2560, 32),
        (2560, 2560, 64),
        (2560, 2560, 256),
        (6912, 2560, 256),
        (2560, 6912, 256),
        (6912, 2560, 512),
        (2560, 6912, 512),
        (576, 576, 256),
        (256, 256, 256),
    ] {
        let bytes = packed(Layout::P2, rows * Layout::P2.row_bytes(cols));
        let x = tokens(count, cols);
        let mut peak_macs = 0.0;
        let mut runs: Vec<Run<'_>> = Vec::new();
        runs.push((
            "peak".into(),
            Box::new(|| {
                let operations = Kernels::detect().int8_peak_probe(100_000);
                peak_macs = operations as f64 / 2.0;
            }),
        ));
        for &k in &kernels {
            if k.name() == "portable" && count > 16 {
                continue;
            }
            let w = TernaryRows { layout: Layout::P2, cols, weight_scale: 0.5, bytes: &bytes };
            let mut out = vec![0f32; rows * count];
            let x = &x;
            runs.push((
                k.name().into(),
                Box::new(move || {
                    k.ternary_matmul(w, black_box(x.view()), MatMut::new(&mut out, count, rows));
                    black_box(&out);
                }),
            ));
        }
        let times = medians(Duration::from_secs(1), &mut runs);
        let names: Vec<String> = runs.iter().map(|(name, _)| name.clone()).collect();
        drop(runs);
        let peak = peak_macs / times[0] * 1e-9;
        let line: Vec<String> = names[1..]
            .iter()
            .zip(&times[1..])
            .map(|(name, t)| {
                let rate = (rows * cols * count) as f64 / t * 1e-9;
                format!("{name} {rate:.0} ({:.0}%)", 100.0 * rate / peak)
            })
            .collect();
        println!("  K {cols} N {rows} T {count:>3}: peak {peak:.0}, {}", line.join(", "));
    }
}

/// Training's float product beside the `gemm` crate and the peak of fused
/// multiply-adds, right operand's packing included.
fn product() {
    println!("float product, one thread (GFLOP/s, share of the peak)");
    let kernels = Kernels::all();
    for (m, n, k, transposed) in [
        (64, 256, 256, false),
        (256, 256, 768, false),
        (256, 256, 1376, false),
        (256, 256, 256, true),
        (256, 256, 2048, true),
        (1376, 256, 2048, true),
        (512, 4096, 256, false),
        (512, 768, 2048, false),
        (768, 768, 2048, true),
    ] {
        let values = |n: usize| -> Vec<f32> {
            noise(n).iter().map(|&b| f32::from(b as i8) * 0.03).collect()
        };
        let (a, b) = (values(m * k), values(k * n));
        let left = if transposed { MatRef::new(&a, k, m, m).t() } else { MatRef::new(&a, m, k, k) };
        let steps = (m * n * k / 400).max(1);
        let mut operations = 0.0;
        let mut runs: Vec<Run<'_>> = vec![(
            "peak".into(),
            Box::new(|| operations = Kernels::detect().float_peak_probe(steps) as f64),
        )];
        for &kernels in kernels.iter().filter(|k| ["avx512vbmi", "avx2"].contains(&k.name())) {
            let mut packed = vec![Unit::default(); packed_len(k, n)];
            let mut out = vec![0.0; m * n];
            let b = &b;
            runs.push((
                kernels.name().into(),
                Box::new(move || {
                    for (i, packed) in packed.chunks_mut(packed_len(PACK_DEPTH, n)).enumerate() {
                        let rows = packed.len() / packed_len(1, n);
                        let rows = MatRef::new(&b[i * PACK_DEPTH * n..], rows, n, n);
                        kernels.pack_block(PackSource::Floats(rows), packed);
                    }
                    let right = PackedRef::new(&packed, k, n);
                    let out_view = MatMut::new(&mut out, m, n);
                    kernels.float_product(black_box(left), right, out_view, false);
                    black_box(&out);
                }),
            ));
        }
        let mut out = vec![0.0f32; m * n];
        let (a_row, a_col) = if transposed { (1, m as isize) } else { (k as isize, 1) };
        let (a_ptr, b_ptr) = (a.as_ptr(), b.as_ptr());
        runs.push((
            "gemm crate".into(),
            Box::new(move || {
                // SAFETY: `a` and `b` hold m · k and k · n elements and outlive the
                // runs; `out` holds m · n.
                unsafe {
                    gemm::gemm(
                        m,
                        n,
                        k,
                        out.as_mut_ptr(),
                        1,
                        n as isize,
                        false,
                        black_box(a_ptr),
                        a_col,
                        a_row,
                        b_ptr,
                        1,
                        n as isize,
                        0.0,
                        1.0,
                        false,
                        false,
                        false,
                        gemm::Parallelism::None,
                    );
                }
                black_box(&out);
            }),
        ));
        let times = medians(Duration::from_secs(1), &mut runs);
        let names: Vec<String> = runs.iter().map(|(name, _)| name.clone()).collect();
        drop(runs);
        let peak = operations / times[0] * 1e-9;
        let line: Vec<String> = names[1..]
            .iter()
            .zip(&times[1..])
            .map(|(name, t)| {
                let rate = (2 * m * n * k) as f64 / t * 1e-9;
                format!("{name} {rate:.0} ({:.0}%)", 100.0 * rate / peak)
            })
            .collect();
        let side = if transposed { "Aᵀ" } else { "A " };
        println!("  {side} M {m} N {n} K {k}: peak {peak:.0}, {}", line.join(", "));
    }
}

/// The products of a backward pass in fixed point, and as floats, everything that one
/// operand needs included but the packing that all rows share: GFLOP/s of what they stand for.
fn fixed() {
    println!("gradients in fixed point, one thread (GFLOP/s; share of the int8 and f32 peaks)");
    let kernels = Kernels::all();
    for (rows, cols, count) in
        [(96, 256, 2048), (96, 768, 1024), (96, 768, 2048), (96, 2048, 1024), (96, 2560, 2048)]
    {
        // As in training: each run takes the next block of a layer's outputs, which lie apart.
        const BLOCKS: usize = 8;
        let width = BLOCKS * rows;
        let g: Vec<f32> = noise(count * width).iter().map(|&b| f32::from(b as i8) * 0.03).collect();
        let turn = std::cell::Cell::new(0);
        // Row by row, as the head's gradient lies.
        let left = |rows_first: bool| {
            turn.set((turn.get() + 1) % BLOCKS);
            let first = turn.get() * rows;
            let all = match rows_first {
                true => MatRef::new(&g, width, count, count),
                false => MatRef::new(&g, count, width, width).t(),
            };
            all.slice_rows(first, first + rows)
        };
        let left = &left;
        let x = tokens(count, cols);
        let mut out = vec![0.0f32; rows * cols];
        let mut runs: Vec<Run<'_>> = Vec::new();
        let (mut int8, mut f32s) = (0.0, 0.0);
        runs.push((
            "int8".into(),
            Box::new(|| int8 = Kernels::detect().int8_peak_probe(100_000) as f64),
        ));
        runs.push((
            "f32".into(),
            Box::new(|| f32s = Kernels::detect().float_peak_probe(100_000) as f64),
        ));
        let out = std::cell::RefCell::new(&mut out);
        for &k in kernels.iter().filter(|k| ["avx512vbmi", "avx2"].contains(&k.name())) {
            let mut lines = vec![Line::default(); k.packed_acts_len(count, cols)];
            let mut units = vec![Unit::default(); packed_len(count, cols)];
            let blocks = lines.chunks_mut(k.packed_acts_len(FIXED_DEPTH, cols)).enumerate();
            for (i, block) in blocks {
                let first = i * FIXED_DEPTH;
                let block_tokens = x.view().tokens(first, count.min(first + FIXED_DEPTH));
                k.pack_acts(block_tokens, 0, block);
            }
            for (i, block) in units.chunks_mut(packed_len(PACK_DEPTH, cols)).enumerate() {
                let first = i * PACK_DEPTH;
                let tokens = x.view().tokens(first, count.min(first + PACK_DEPTH));
                k.pack_block(PackSource::Int8 { tokens, cols }, block);
            }
            let (x, out, lines) = (&x, &out, std::rc::Rc::new(lines));
            for digits in [Digits::Three, Digits::Two] {
                for (name, rows_first) in [("weights", false), ("rows", true)] {
                    let lines = lines.clone();
                    runs.push((
                        format!("{name} {digits:?} {}", k.name()),
                        Box::new(move || {
                            let acts = PackedActs::new(&lines, &x.scales, cols);
                            let mut out = out.borrow_mut();
                            let out = MatMut::new(&mut out, rows, cols);
                            k.fixed_product(digits, black_box(left(rows_first)), acts, out, false);
                        }),
                    ));
                }
            }
            runs.push((
                format!("weights float {}", k.name()),
                Box::new(move || {
                    let right = PackedRef::new(&units, count, cols);
                    let mut out = out.borrow_mut();
                    k.float_product(
                        black_box(left(false)),
                        right,
                        MatMut::new(&mut out, rows, cols),
                        false,
                    );
                }),
            ));
            // From a gradient of `cols` to an input of as many, in chunks of a task.
            let chunk = 128;
            let own =
                noise(chunk * cols).iter().map(|&b| f32::from(b as i8) * 0.03).collect::<Vec<_>>();
            let bytes = packed(Layout::P2, cols * Layout::P2.row_bytes(cols));
            let mut turned = vec![Unit::default(); packed_len(cols, cols)];
            for (i, block) in turned.chunks_mut(packed_len(PACK_DEPTH, cols)).enumerate() {
                let row = Layout::P2.row_bytes(cols);
                let end = cols.min((i + 1) * PACK_DEPTH);
                let bytes = &bytes[i * PACK_DEPTH * row..end * row];
                k.pack_block(PackSource::Ternary { bytes, cols, scale: 0.5 }, block);
            }
            let bytes = std::rc::Rc::new(bytes);
            for kind in [Digits::Three, Digits::Two] {
                let (count, bytes) = (kind.count(), bytes.clone());
                let mut digits = QuantizedTokens::default();
                digits.resize(count * chunk, cols);
                let mut dx = vec![0.0f32; chunk * cols];
                let g = own.clone();
                runs.push((
                    format!("inputs {kind:?} {}", k.name()),
                    Box::new(move || {
                        let stride = digits.stride;
                        for (t, g) in g.chunks_exact(cols).enumerate() {
                            let all = t * count..(t + 1) * count;
                            let q = &mut digits.q[all.start * stride..all.end * stride];
                            let step = k.digits(kind, g, q, &mut digits.sums[all.clone()]);
                            digits.scales[all].fill(step);
                        }
                        let layout = Layout::P2;
                        let w = TernaryRows { layout, cols, weight_scale: 0.5, bytes: &bytes };
                        let out = MatMut::new(&mut dx, chunk, cols);
                        k.ternary_matmul_fixed(kind, w, digits.view(), out);
                        black_box(&dx);
                    }),
                ));
            }
            let mut dx = vec![0.0f32; chunk * cols];
            runs.push((
                format!("inputs float {}", k.name()),
                Box::new(move || {
                    let g = MatRef::new(&own, chunk, cols, cols);
                    let right = PackedRef::new(&turned, cols, cols);
                    k.float_product(black_box(g), right, MatMut::new(&mut dx, chunk, cols), false);
                    black_box(&dx);
                }),
            ));
        }
        let times = medians(Duration::from_secs(1), &mut runs);
        let names: Vec<String> = runs.iter().map(|(name, _)| name.clone()).collect();
        drop(runs);
        let (int8, f32s) = (int8 / times[0] * 1e-9, f32s / times[1] * 1e-9);
        println!("  {rows} rows, {cols} columns, {count} tokens: int8 {int8:.0}, f32 {f32s:.0}");
        for (name, time) in names[2..].iter().zip(&times[2..]) {
            let of_inputs = name.starts_with("inputs");
            let operations = if of_inputs { 128 * cols } else { rows * count } * cols;
            let rate = 2.0 * operations as f64 / time * 1e-9;
            let digits = if name.contains("Three") { 3.0 } else { 2.0 };
            let of_int8 = 100.0 * digits * rate / int8;
            let of_f32 = 100.0 * rate / f32s;
            match name.contains("float") {
                true => println!("    {name}: {rate:.0} ({of_f32:.0}% of f32)"),
                false => {
                    println!("    {name}: {rate:.0} ({of_int8:.0}% of int8, {of_f32:.0}% of f32)")
                }
            }
        }
    }
}

/// The float operations, in elements a second.
fn float() {
    println!("float operations, one thread (G elements/s)");
    let n = 6912;
    let a: Vec<f32> = noise(n).iter().map(|&b| f32::from(b as i8) * 0.03).collect();
    let weight = vec![1.1f32; n];
    let kernels = Kernels::all();
    let line = |name: &str, elements: usize, run: &mut dyn FnMut(Kernels)| {
        let mut cells = Vec::new();
        for &k in &kernels {
            let mut runs: Vec<Run<'_>> =
                vec![(String::new(), Box::new(|| (0..20).for_each(|_| run(k))))];
            let t = medians(Duration::from_millis(200), &mut runs)[0];
            cells.push(format!("{} {:.2}", k.name(), (20 * elements) as f64 / t * 1e-9));
        }
        println!("  {name}: {}", cells.join(", "));
    };
    let mut out = vec![0f32; n];
    let mut q = vec![0i8; n];
    line("rms_norm", n, &mut |k| {
        black_box(k.rms_norm(black_box(&a), &weight, 1e-5, &mut out));
    });
    line("quantize", n, &mut |k| {
        black_box(k.quantize(black_box(&a), &mut q));
    });
    line("rms_norm_quantize", n, &mut |k| {
        black_box(k.rms_norm_quantize(black_box(&a), &weight, 1e-5, &mut out, &mut q));
    });
    line("relu2_mul + rms_norm + quantize", n, &mut |k| {
        let act = Activation::Relu2;
        let gate = black_box(&a[..]);
        black_box(k.gated_norm_quantize(act, gate, &a, &weight, 1e-5, &mut out, &mut q));
    });
    line("silu_mul", n, &mut |k| k.silu_mul(black_box(&a), &weight, &mut out));
    line("relu2_mul", n, &mut |k| k.relu2_mul(black_box(&a), &weight, &mut out));
    line("exp_sum", n, &mut |k| {
        out.copy_from_slice(black_box(&a));
        black_box(k.exp_sum(&mut out));
    });
    line("dot", n, &mut |k| {
        black_box(k.dot(black_box(&a), &weight));
    });
    line("row_abs_sum", n, &mut |k| {
        black_box(k.row_abs_sum(black_box(&a)));
    });
    line("quantize_weight_row", n, &mut |k| {
        k.quantize_weight_row(black_box(&a), 1.3, &mut q);
    });
    let mut bytes = vec![0u8; Layout::P2.row_bytes(n)];
    line("pack_weight_row", n, &mut |k| {
        k.pack_weight_row(black_box(&a), 1.3, &mut bytes);
    });
    // More than a cache holds, as in training.
    let many = 1 << 23;
    let step = AdamW {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        scale: 1.0,
        keep: 0.9999,
        rate: 1e-3,
        root: 1.0,
    };
    let g: Vec<f32> = (0..many).map(|i| a[i % n]).collect();
    let (mut p, mut first, mut second) = (g.clone(), vec![0.0; many], vec![0.0; many]);
    line("adamw", many, &mut |k| k.adamw(&step, &mut p, black_box(&g), &mut first, &mut second));
    let (mut first, mut second) = (vec![128; many], vec![0; many]);
    let mut scales = vec![[0.0; 2]; many / MOMENT_BLOCK];
    line("adamw, moments as bytes", many, &mut |k| {
        let moments = MomentsMut { first: &mut first, second: &mut second, scales: &mut scales };
        k.adamw_bytes(&step, (1, 0), &mut p, black_box(&g), moments);
    });
    let (len, head) = (1000, 128);
    let mut keys = vec![f16::ZERO; key_blocks_len(len, head)];
    (0..len).for_each(|t| store_key(&mut keys, t, &a[t..t + head]));
    let values: Vec<f16> = (0..len * head).map(|i| f16::from_f32(a[i % n])).collect();
    // Two tokens of four heads that share a key and value head.
    let queries: Vec<AttendQuery> =
        (0..8).map(|i| AttendQuery { at: i * head, len: len - 1 + i / 4 }).collect();
    let mut scores = vec![0f32; attend_scores_len(8, len)];
    let mut outs = vec![0f32; 8 * head];
    let wide_keys: Vec<f32> = keys.iter().map(|x| x.to_f32()).collect();
    let wide_values: Vec<f32> = values.iter().map(|x| x.to_f32()).collect();
    let mut int8 = (vec![0i8; keys.len()], vec![0.0; 1008], vec![0i8; len * head], vec![0.0; len]);
    for t in 0..len {
        let (keys, key_scales) = (&mut int8.0[..], &mut int8.1[..]);
        let (values, value_scales) = (&mut int8.2[..], &mut int8.3[..]);
        let cache = KvHeadInt8Mut { keys, key_scales, values, value_scales };
        Kernels::detect().store_int8(cache, t, &a[t..t + head], &wide_values[t * head..][..head]);
    }
    let (keys_int8, key_scales, values_int8, value_scales) =
        (&int8.0[..], &int8.1[..], &int8.2[..], &int8.3[..]);
    let kinds = [
        ("f32", KvHead::F32 { keys: &wide_keys, values: &wide_values }),
        ("f16", KvHead::F16 { keys: &keys, values: &values }),
        ("int8", KvHead::Int8 { keys: keys_int8, key_scales, values: values_int8, value_scales }),
    ];
    for (name, kv) in kinds {
        for count in [1, 4, 8] {
            let name = format!("attend {name} {count} queries (GMAC/s)");
            line(&name, 2 * count * len * head, &mut |k| {
                k.attend_tile(&queries[..count], &a, kv, head, 0.08, &mut scores, &mut outs);
            });
        }
    }
    let (rows, cols) = (400, 2560);
    let w: Vec<f16> = (0..rows * cols).map(|i| f16::from_f32(a[i % n])).collect();
    let mut head_out = vec![0f32; rows];
    line("dense_matvec f16", rows * cols, &mut |k| {
        k.dense_matvec(DenseRows::F16(&w), &a[..cols], &mut head_out);
    });
    for count in [2, 4, 6, 8, 64] {
        let xs: Vec<f32> = (0..count * cols).map(|i| a[i % n]).collect();
        let mut outs = vec![0f32; count * rows];
        line(&format!("dense_matmul f16 T {count} (GMAC/s)"), count * rows * cols, &mut |k| {
            let out = MatMut::new(&mut outs, count, rows);
            k.dense_matmul(DenseRows::F16(&w), &xs, cols, out);
        });
    }
}
