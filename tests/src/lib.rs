//! The harness of the integration tests: it starts monitors, talks to them, looks at them from outside and
//! leaves nothing behind.
//!
//! It reads these variables, which the Makefile sets: `CORACLE_BIN`, `CORACLECTL_BIN` and `CORACLE_JAILER_BIN` (the
//! programs under test), `CORACLE_UNIKERNEL` (an ELF file), `CORACLE_LINUX` (a directory with a `manifest.json`),
//! `CORACLE_CLIENT_PYTHON` (an interpreter with the pinned Firecracker client), `FIRECRACKER` (its
//! binary, to compare with; optional), `SEED` (to replay a sample; optional), `CELLS` (a part of the
//! names of the cells of a table that are to be run; optional) and `CORACLE_JAILED` (`root` or `rootless`: who puts every monitor
//! into a jail; optional, see [`mod@jailing`]).
//!
//! The benchmarks stand on it too; what they alone need is in [`mod@bench`].

pub mod audit;
pub mod bench;
pub mod case;
pub mod certificates;
pub mod console;
pub mod environment;
pub mod exchange;
pub mod golden;
pub mod guest;
pub mod harness;
pub mod http;
pub mod jailing;
pub mod monitor;
pub mod probe;
pub mod process;
pub mod seed;
pub mod shape;
pub mod tree;

/// What a step of a test returns; any error with a text turns into a failure by `?`.
pub type Outcome<T = ()> = Result<T, libtest_mimic::Failed>;

/// Ends a step with a failure whose text is formatted, unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(libtest_mimic::Failed::from(format!($($text)+)));
        }
    };
}
