//! What makes an image ours: which one it is, and its leases.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use super::OpenError;
use crate::iscsi::{self, ImageName};
use crate::lease::{Contest, Incarnation, Lease, Offer, Opposition, TakenBack};
use crate::nfs;
use crate::overlay::copy::View;
use crate::remote::lease::RemoteLease;

/// What makes an image ours. To be dropped after its backend.
#[derive(Debug)]
pub struct Hold {
    id: ImageId,
    leases: Vec<Lease>,
    /// That of an image of a network.
    remote: Option<Box<RemoteLease>>,
    overlay: Option<View>,
}

impl Hold {
    pub(super) fn new(id: ImageId, lease: Option<Lease>) -> Self {
        let leases = lease.into_iter().collect();
        Self {
            id,
            leases,
            remote: None,
            overlay: None,
        }
    }

    /// The same of an image of a network, whose disk has the fence.
    pub(super) fn of_remote(id: ImageId, lease: Option<RemoteLease>) -> Self {
        Self {
            remote: lease.map(Box::new),
            ..Self::new(id, None)
        }
    }

    /// Whether `path` names the image that is held, by whatever name and device node.
    pub fn is_of(&self, path: &str) -> bool {
        if let Some(name) = iscsi::image_name(path) {
            return self.id == ImageId::Unit(name);
        }
        if let Some(name) = nfs::image_name(path) {
            return self.id == ImageId::Export(name);
        }
        fs::metadata(path).is_ok_and(|metadata| ImageId::of(&metadata) == self.id)
    }

    /// The image by a descriptor of its own, for whoever reads it meanwhile: `path` names it. Not one of a network.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, or `path` names another by now.
    pub fn reader(&self, path: &str) -> io::Result<File> {
        self.id.reader(path)
    }

    /// Waits until the leases are recorded durably. Nothing may be written before.
    ///
    /// # Errors
    ///
    /// Why one is not; then the image is not to be used.
    pub fn settle(&mut self) -> Result<(), OpenError> {
        Ok(self.leases.iter_mut().try_for_each(Lease::settle)?)
    }

    /// The generation of what is written, if the host has a record of it. That of an image of a network is told by its
    /// session ([`crate::metrics::SessionMetrics`]).
    pub fn generation(&self) -> Option<u64> {
        self.leases.iter().find_map(Lease::generation)
    }

    /// Begins to raise the generation where the host has a record of it, durably. Nothing may be written before
    /// [`Self::settle`]; `done` is called for each record when that does not wait for it any more.
    ///
    /// # Errors
    ///
    /// Why one is not begun.
    pub fn begin_raise(&mut self, done: &(impl Fn() + Clone + Send + 'static)) -> Result<(), OpenError> {
        let raise = |lease: &mut Lease| lease.begin_raise(done.clone());
        Ok(self.leases.iter_mut().try_for_each(raise)?)
    }

    /// Whether [`Self::settle`] has nothing to wait for.
    pub fn is_settled(&self) -> bool {
        self.leases.iter().all(Lease::is_settled)
    }

    /// The overlay, if the image is one, for whoever copies it while nobody writes.
    pub fn overlay(&self) -> Option<&View> {
        self.overlay.as_ref()
    }

    /// The image is an overlay.
    pub(crate) fn shows(&mut self, overlay: View) {
        self.overlay = Some(overlay);
    }

    /// What a new owner needs to know to take the image over; nothing if there is no record of its lease.
    pub fn offer(&self) -> Option<Offer> {
        let remote = self.remote.as_ref().and_then(|remote| remote.offer());
        remote.or_else(|| self.leases.iter().find_map(Lease::offer))
    }

    /// Takes the fence down: whoever has the offer may take the image over. Nothing may be written from now on. The fence of an
    /// image of a network is its disk's, which takes it down by [`crate::request::Operation::Yield`].
    ///
    /// # Errors
    ///
    /// Why it stays up.
    pub fn yield_fence(&mut self) -> Result<(), OpenError> {
        if let Some(remote) = &mut self.remote {
            remote.yield_fence();
        }
        Ok(self.leases.iter_mut().try_for_each(Lease::yield_fence)?)
    }

    /// Begins to say, durably, that the machine goes on elsewhere with a copy of this image, which nobody is to take up by
    /// mistake. The fence stays up. Nothing is to be done with the image before [`Self::settle`]; `done` is called for each
    /// record when that does not wait for it any more.
    ///
    /// # Errors
    ///
    /// Why it is not begun.
    pub fn begin_move_away(&mut self, done: &(impl Fn() + Clone + Send + 'static)) -> Result<(), OpenError> {
        let leave = |lease: &mut Lease| lease.begin_move_away(done.clone());
        Ok(self.leases.iter_mut().try_for_each(leave)?)
    }

    /// Makes the step that opposes the next one of the new owner. To be repeated if it fails. With an image of a network this
    /// takes as long as its server does.
    ///
    /// # Errors
    ///
    /// When it cannot be told whose the step is.
    pub fn oppose(&mut self, opposition: Opposition) -> Result<Contest, OpenError> {
        if let Some(remote) = &self.remote {
            match remote.oppose(opposition)? {
                Contest::Won => {}
                lost => return Ok(lost),
            }
        }
        for lease in &mut self.leases {
            match lease.oppose(opposition)? {
                Contest::Won => {}
                lost => return Ok(lost),
            }
        }
        Ok(Contest::Won)
    }

    /// Has the image back and puts the fence up again: for whoever has won the step that decides against the owner `other`. To
    /// be repeated if it fails, or while the other one's fence is up. The fence of an image of a network is put up by its disk
    /// afterwards, by [`crate::request::Operation::TakeBack`]: until that has ended this is to be asked again.
    ///
    /// # Errors
    ///
    /// When it is not ours.
    pub fn take_back(&mut self, other: Option<Incarnation>) -> Result<TakenBack, OpenError> {
        if let Some(remote) = &self.remote {
            match remote.take_back(other)? {
                TakenBack::Done => {}
                undone => return Ok(undone),
            }
        }
        for lease in &mut self.leases {
            match lease.take_back(other)? {
                TakenBack::Done => {}
                undone => return Ok(undone),
            }
        }
        Ok(TakenBack::Done)
    }

    /// The image is ours, and all fences are up.
    pub fn is_back(&mut self) {
        if let Some(remote) = &mut self.remote {
            remote.is_back();
        }
    }

    /// Takes the fences down, as the death of the process does.
    #[cfg(test)]
    pub(crate) fn fall(&self) {
        self.leases.iter().for_each(Lease::fall);
    }

    /// Keeps a lease of something that belongs to the image.
    pub(crate) fn extend(&mut self, lease: Option<Lease>) {
        self.leases.extend(lease);
    }

    /// Keeps the leases of `other` as well: it cannot be told when that image is closed.
    pub fn keep(&mut self, other: Self) {
        self.leases.extend(other.leases);
    }
}

/// What is one image, however it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ImageId {
    Unit(ImageName),
    /// A file on an NFS server.
    Export(nfs::ImageName),
    File {
        device: u64,
        inode: u64,
    },
    BlockDevice {
        number: u64,
    },
}

impl ImageId {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self::BlockDevice {
                number: metadata.rdev(),
            }
        } else {
            Self::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            }
        }
    }

    /// The file or device by a descriptor of its own: `path` names it.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, or `path` names another by now.
    pub(crate) fn reader(&self, path: &str) -> io::Result<File> {
        // A FIFO that has its name by now is not waited for.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        if Self::of(&file.metadata()?) == *self {
            Ok(file)
        } else {
            Err(io::Error::other("another file has its name by now"))
        }
    }
}
