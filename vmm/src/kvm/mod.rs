//! KVM: the device, the virtual machine and its vCPU threads. The only module that runs KVM ioctls
//! while the machine lives.

pub mod share;
pub mod state;
pub mod vcpu;
pub mod vm;

/// An ioctl that failed, by name.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` is missing.
    #[error(
        "/dev/kvm does not exist: enable virtualization in the firmware and load the module (modprobe kvm_intel or kvm_amd)"
    )]
    Missing,
    /// `/dev/kvm` may not be opened.
    #[error(
        "no permission to open /dev/kvm: add the user to the group that owns it (usually `kvm`), or set an ACL"
    )]
    Permission,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("cannot open /dev/kvm")]
    Open(#[source] std::io::Error),
    /// The API is not the one that every kernel since 2.6.22 has.
    #[error("/dev/kvm speaks API version {0}, not 12")]
    Version(i32),
    /// More vCPUs than the host's KVM takes.
    #[error("{wanted} vCPUs were asked for and this host's KVM takes at most {limit}: lower vcpu_count")]
    TooManyVcpus {
        /// What the configuration says.
        wanted: u8,
        /// KVM_CAP_MAX_VCPUS.
        limit: usize,
    },
    /// An ioctl failed.
    #[error("{ioctl} failed")]
    Ioctl {
        /// Its name.
        ioctl: &'static str,
        /// What it answered.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Names the ioctl in its error: `.map_err(failed("KVM_CREATE_VM"))`.
pub(crate) fn failed(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Ioctl { ioctl, source }
}
