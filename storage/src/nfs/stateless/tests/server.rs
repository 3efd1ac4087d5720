//! A server of NFSv3 that does as it is told, on one port: PORTMAP, MOUNT, and NFS with one file.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::nfs::rpc::{Call, RECORD_MARK_BYTES, RecordMark, Reply, RpcError, program};
use crate::nfs::v3::{
    Answer, Attributes, Export, Exports, FileHandle, FileType, FsinfoResult, Lookup, LookupResult, Mapping,
    MountPath, MountResult, MountStatus, Read, ReadResult, Status, Time, mount_procedure, parse,
    portmap_procedure, procedure,
};
use crate::nfs::xdr::{Reader, Writer, Xdr};

/// What the server has, and what it is to do.
pub(super) struct State {
    /// Directories and the file, each in the one before.
    names: Vec<&'static str>,
    content: Vec<u8>,
    pub(super) exports: Vec<&'static str>,
    /// It does not say what it exports.
    pub(super) is_secretive: bool,
    pub(super) is_mount_refused: bool,
    pub(super) is_unreadable: bool,
    /// The file is another, and its handle is none any more.
    pub(super) is_stale: bool,
    pub(super) fileid: u64,
    /// Ports of programs.
    pub(super) ports: Vec<(u32, u16)>,
    /// Most data of an answer to a READ.
    pub(super) bytes_max: usize,
    /// Records come in pieces of this length.
    pub(super) fragment_bytes: Option<usize>,
    /// The connection is closed when so much of the next answer to a READ was sent.
    pub(super) cut_after: Option<usize>,
    /// So many connections, of those there are, are not answered any more from their next call on.
    pub(super) mute_connections: u32,
    /// So many READs are put off.
    pub(super) put_off: u32,
    /// READs are not answered yet.
    pub(super) is_held: bool,
    /// How many are not.
    pub(super) held: usize,
    pub(super) nulls: usize,
    pub(super) calls: usize,
}

/// A running server.
pub(super) struct Served {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

/// What becomes of a call.
enum Done {
    /// It is answered by this record.
    Answered(Vec<u8>),
    /// The same of a READ.
    Read(Vec<u8>),
    /// Not yet.
    Held,
    /// Never, as nothing else on this connection.
    Mute,
}

impl State {
    pub(super) fn new(names: &[&'static str], content: Vec<u8>) -> Self {
        Self {
            names: names.to_vec(),
            content,
            exports: vec!["/srv", "/home"],
            is_secretive: false,
            is_mount_refused: false,
            is_unreadable: false,
            is_stale: false,
            fileid: 7,
            ports: Vec::new(),
            bytes_max: 1 << 20,
            fragment_bytes: None,
            cut_after: None,
            mute_connections: 0,
            put_off: 0,
            is_held: false,
            held: 0,
            nulls: 0,
            calls: 0,
        }
    }

    fn does(&mut self, record: &[u8]) -> Done {
        if self.mute_connections > 0 {
            self.mute_connections -= 1;
            return Done::Mute;
        }
        let mut reader = Reader::new(record);
        let call = Call::parse(&mut reader).unwrap();
        let is_read = (call.program, call.procedure) == (program::NFS, procedure::READ);
        let is_of_disk = is_read && parse::<Read>(reader.rest()).unwrap().count > 1;
        if self.is_held && is_of_disk {
            return Done::Held;
        }
        let mut writer = Writer::default();
        let outcome = if self.is_secretive
            && call.program == program::MOUNT
            && call.procedure == mount_procedure::EXPORT
        {
            Err(RpcError::ProcedureUnavailable)
        } else {
            Ok(())
        };
        let xid = call.xid;
        Reply { xid, outcome }.put(&mut writer);
        if outcome.is_ok() {
            self.answer(&call, reader.rest(), &mut writer);
        }
        self.calls += 1;
        match is_of_disk {
            true => Done::Read(writer.into_bytes()),
            false => Done::Answered(writer.into_bytes()),
        }
    }

    fn answer(&mut self, call: &Call, arguments: &[u8], writer: &mut Writer) {
        match (call.program, call.procedure) {
            (program::PORTMAP, portmap_procedure::GETPORT) => {
                let wanted = parse::<Mapping>(arguments).unwrap();
                assert_eq!(
                    (wanted.version, wanted.protocol),
                    (if wanted.program == program::PORTMAP { 2 } else { 3 }, 6)
                );
                let port = self.ports.iter().find(|(program, _)| *program == wanted.program);
                writer.u32(port.map_or(0, |(_, port)| u32::from(*port)));
            }
            (program::MOUNT, mount_procedure::EXPORT) => {
                let export = |path: &&str| Export {
                    path: MountPath(path.as_bytes().to_vec()),
                    groups: vec![b"10.0.0.0/8".to_vec()],
                };
                Exports(self.exports.iter().map(export).collect()).put(writer);
            }
            (program::MOUNT, mount_procedure::MNT) => {
                let path = parse::<MountPath>(arguments).unwrap();
                let handle = handle(path.0.iter().filter(|byte| **byte == b'/').count());
                let mounted = MountResult {
                    handle,
                    flavors: vec![1],
                };
                let is_exported = self.exports.iter().any(|export| export.as_bytes() == path.0);
                let outcome = match is_exported && !self.is_mount_refused {
                    true => Ok(&mounted),
                    false => Err(MountStatus::ACCES),
                };
                MountResult::answer(outcome, writer);
            }
            (program::NFS, procedure::NULL) => self.nulls += 1,
            (program::NFS, procedure::LOOKUP) => {
                LookupResult::answer(self.lookup(arguments).as_ref().map_err(|it| *it), writer)
            }
            (program::NFS, procedure::FSINFO) => FsinfoResult::answer(Ok(&fsinfo()), writer),
            (program::NFS, procedure::GETATTR) => match self.is_stale {
                true => Attributes::answer(Err(Status::STALE), writer),
                false => Attributes::answer(Ok(&self.attributes(self.names.len())), writer),
            },
            (program::NFS, procedure::READ) => self.read(arguments, writer),
            other => panic!("{other:?} was called"),
        }
    }

    fn lookup(&self, arguments: &[u8]) -> Result<LookupResult, Status> {
        let lookup = parse::<Lookup>(arguments).unwrap();
        let depth = usize::from(*lookup.directory.bytes().first().unwrap());
        let name = self.names.get(depth).map(|name| name.as_bytes());
        if name != Some(lookup.name.bytes()) {
            return Err(Status::NOENT);
        }
        Ok(LookupResult {
            handle: handle(depth + 1),
            // Not every server says that.
            attributes: (depth + 1 < self.names.len()).then(|| self.attributes(depth + 1)),
            directory_attributes: None,
        })
    }

    fn read(&mut self, arguments: &[u8], writer: &mut Writer) {
        let read = parse::<Read>(arguments).unwrap();
        assert_eq!(read.handle, handle(self.names.len()));
        let status = match () {
            () if self.is_stale => Some(Status::STALE),
            () if self.is_unreadable => Some(Status::ACCES),
            () if self.put_off > 0 => Some(Status::JUKEBOX),
            () => None,
        };
        self.put_off = self.put_off.saturating_sub(1);
        if let Some(status) = status {
            return ReadResult::answer(Err(status), writer);
        }
        let offset = usize::try_from(read.offset).unwrap();
        let rest = self.content.get(offset..).unwrap_or_default();
        let count = usize::try_from(read.count)
            .unwrap()
            .min(self.bytes_max)
            .min(rest.len());
        let result = ReadResult {
            attributes: Some(self.attributes(self.names.len())),
            eof: count == rest.len(),
            data: rest.get(..count).unwrap(),
        };
        ReadResult::answer(Ok(&result), writer);
    }

    fn attributes(&self, depth: usize) -> Attributes {
        let is_file = depth == self.names.len();
        let time = Time::default();
        Attributes {
            file_type: if is_file {
                FileType::Regular
            } else {
                FileType::Directory
            },
            mode: 0o755,
            nlink: 1,
            uid: 0,
            gid: 0,
            size: self.content.len() as u64,
            used: 0,
            rdev: [0; 8],
            fsid: 1,
            fileid: if is_file { self.fileid } else { 100 + depth as u64 },
            atime: time,
            mtime: time,
            ctime: time,
        }
    }
}

/// That of the directory or file so deep.
fn handle(depth: usize) -> FileHandle {
    FileHandle::new(&[u8::try_from(depth).unwrap(), 0xfe]).unwrap()
}

fn fsinfo() -> FsinfoResult {
    FsinfoResult {
        attributes: None,
        rtmax: 256 << 10,
        rtpref: 256 << 10,
        rtmult: 4096,
        wtmax: 0,
        wtpref: 0,
        wtmult: 0,
        dtpref: 0,
        maxfilesize: u64::MAX,
        time_delta: Time::default(),
        properties: 0,
    }
}

impl Served {
    pub(super) fn start(state: State) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(state));
        let served = Self {
            address,
            state: Arc::clone(&state),
        };
        // It ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, state) = (stream.unwrap(), Arc::clone(&state));
                std::thread::spawn(move || serve(stream, &state));
            }
        });
        served
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn with<T>(&self, body: impl FnOnce(&mut State) -> T) -> T {
        body(&mut self.state.lock().unwrap())
    }
}

/// Serves one connection until it breaks.
fn serve(mut stream: TcpStream, state: &Mutex<State>) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(10))).ok()?;
    let mut held: Vec<Vec<u8>> = Vec::new();
    let mut is_mute = false;
    loop {
        let next = match record(&mut stream) {
            Ok(next) => next,
            Err(()) => {
                state.lock().unwrap().held -= held.len();
                return None;
            }
        };
        let mut locked = state.lock().unwrap();
        locked.held -= held.len();
        let calls: Vec<Vec<u8>> = held.drain(..).chain(next).collect();
        for call in calls {
            if is_mute {
                continue;
            }
            match locked.does(&call) {
                Done::Held => held.push(call),
                Done::Mute => is_mute = true,
                Done::Answered(answer) => send(&mut stream, &answer, None)?,
                Done::Read(answer) => {
                    if let Some(cut_after) = locked.cut_after.take() {
                        let bytes = wire(&answer, None);
                        stream.write_all(bytes.get(..cut_after).unwrap()).ok()?;
                        return stream.shutdown(Shutdown::Both).ok();
                    }
                    send(&mut stream, &answer, locked.fragment_bytes)?;
                }
            }
        }
        locked.held += held.len();
    }
}

/// The next record, if one comes soon.
fn record(stream: &mut TcpStream) -> Result<Option<Vec<u8>>, ()> {
    let mut mark = [0; RECORD_MARK_BYTES];
    match stream.peek(&mut mark) {
        Ok(RECORD_MARK_BYTES) => {}
        Ok(0) => return Err(()),
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
        Err(_) => return Err(()),
    }
    stream.read_exact(&mut mark).map_err(drop)?;
    let mark = RecordMark::parse(mark, 1 << 20).map_err(drop)?;
    let mut record = vec![0; mark.fragment_bytes];
    stream.read_exact(&mut record).map_err(drop)?;
    Ok(Some(record))
}

fn send(stream: &mut TcpStream, record: &[u8], fragment_bytes: Option<usize>) -> Option<()> {
    stream.write_all(&wire(record, fragment_bytes)).ok()
}

/// A record in pieces, each behind its mark.
fn wire(record: &[u8], fragment_bytes: Option<usize>) -> Vec<u8> {
    let fragments: Vec<&[u8]> = record.chunks(fragment_bytes.unwrap_or(usize::MAX)).collect();
    let count = fragments.len();
    let pieces = fragments.into_iter().enumerate().map(|(number, fragment)| {
        let mark = RecordMark {
            is_last: number + 1 == count,
            fragment_bytes: fragment.len(),
        };
        [&mark.wire(), fragment].concat()
    });
    pieces.flatten().collect()
}
