//! Pack a checkpoint into one self-describing file.
