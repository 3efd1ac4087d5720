//! `coraclectl`: the client that people and CI jobs type.

fn main() {}
