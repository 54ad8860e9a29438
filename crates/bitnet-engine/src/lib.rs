//! Run a packed ternary model on the CPU.
