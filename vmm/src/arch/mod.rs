//! What differs between processor architectures. Only x86-64 so far.

pub mod x86_64;
