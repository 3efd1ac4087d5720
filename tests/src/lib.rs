//! Integration tests: their harness.
