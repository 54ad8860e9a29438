//! A safetensors file: its header, and every tensor as floats and as bytes.
#![no_main]

use std::sync::LazyLock;

use bitnet_format::hf::TensorFile;
use bitnet_fuzz::{bounded, scratch};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(scratch);

fuzz_target!(|bytes: &[u8]| {
    let path = FOLDER.path().join("model.safetensors");
    std::fs::write(&path, bytes).expect("room for the input");
    bounded(bytes.len(), || {
        let Ok(file) = TensorFile::open(&path) else { return };
        let _ = file.meta("format");
        for name in file.names() {
            let elements: usize = file.shape(&name).expect("a tensor it names").iter().product();
            if let Ok(values) = file.read(&name) {
                assert_eq!(values.len(), elements);
            }
            let _ = (file.read_bytes(&name), file.float_type(&name));
            assert!(file.read_at(&name, elements, &mut [0.0]).is_err());
        }
    });
});
