//! Writes the OpenAPI document of the API to standard output.

use std::io::{self, Write as _};

fn main() -> io::Result<()> {
    io::stdout().write_all(coracle_vmm::api::openapi::document().as_bytes())
}
