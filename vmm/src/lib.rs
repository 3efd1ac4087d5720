//! The machine: KVM, boot, configuration, the API.
