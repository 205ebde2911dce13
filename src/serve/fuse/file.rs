//! The file: what the kernel asks, as requests to the disk.

use super::work::{Turn, Work};
use crate::ground::range::{Allocation, ByteRange};
use crate::publish::attributes;
use crate::serve::disk::Disk;
use fuser::{
    CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, WriteFlags,
};
use nix::libc;
use std::cell::RefCell;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Bytes of one write; the kernel's own limit unless it was raised.
const MAX_WRITE: u32 = 1 << 20;
/// Asynchronous requests that the kernel sends at once: writes that wait must not hold back reads.
const MAX_BACKGROUND: u16 = 256;
/// Attributes are asked for each time: others may write the disk, too.
const NO_TIME: Duration = Duration::ZERO;

/// See the module.
pub struct File {
    disk: Arc<Disk>,
    work: Arc<Work>,
}

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl File {
    pub fn new(disk: Arc<Disk>, work: Arc<Work>) -> Self {
        Self { disk, work }
    }

    fn attributes(&self) -> io::Result<FileAttr> {
        let length = self.disk.length();
        let image = self.disk.file().map(|file| file.metadata()).transpose()?;
        let image = image.as_ref();
        let epoch = SystemTime::UNIX_EPOCH;
        let changed = |of: &std::fs::Metadata| {
            u64::try_from(of.ctime()).map_or(epoch, |s| epoch + Duration::new(s, of.ctime_nsec() as u32))
        };
        Ok(FileAttr {
            ino: INodeNo::ROOT,
            size: length,
            blocks: image.filter(|image| image.is_file()).map_or(length.div_ceil(512), |image| image.blocks()),
            atime: image.and_then(|image| image.accessed().ok()).unwrap_or(epoch),
            mtime: image.and_then(|image| image.modified().ok()).unwrap_or(epoch),
            ctime: image.map_or(epoch, changed),
            crtime: epoch,
            kind: FileType::RegularFile,
            perm: image.map_or(0o600, |image| self.permissions(image.mode())),
            nlink: 1,
            uid: image.map_or(0, |image| image.uid()),
            gid: image.map_or(0, |image| image.gid()),
            rdev: 0,
            blksize: self.disk.sizes().preferred,
            flags: 0,
        })
    }

    /// Beside an access control list the group's bits are the most that anybody on it has; without the list, which the kernel does
    /// not know of this file, they would give the group that.
    fn permissions(&self, mode: u32) -> u16 {
        let has_list = self.disk.file().is_some_and(attributes::has_access_list);
        (mode & if has_list { 0o707 } else { 0o777 }) as u16
    }

    /// Carries out a change here, or has it carried out; `bytes` are what it holds.
    fn change(&self, turn: Turn, bytes: usize, change: impl FnOnce(&Disk) + Send + 'static) {
        let disk = self.disk.clone();
        let job = move || {
            change(&disk);
            drop(turn);
        };
        match self.work.place() {
            Some(_place) => job(),
            None => self.work.hand_over(bytes, job),
        }
    }

    fn allocate(&self, offset: u64, length: u64, mode: i32) -> Result<(ByteRange, bool), Errno> {
        let range = ByteRange::checked(offset, length).ok_or(Errno::EFBIG)?;
        let length = self.disk.length();
        // Behind the end there is nothing to change, and that is no error.
        let inside = ByteRange::between(offset.min(length), range.end().min(length));
        let keeps_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE if keeps_size => Ok((inside, true)),
            libc::FALLOC_FL_ZERO_RANGE if keeps_size || inside == range => Ok((inside, false)),
            libc::FALLOC_FL_ZERO_RANGE => Err(Errno::EFBIG),
            // Space can't be promised beforehand; the C library then writes it.
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    /// Where data, or a hole, starts at or after `offset`. The end of the file is a hole.
    fn seek(&self, offset: u64, wanted: Allocation) -> io::Result<u64> {
        let length = self.disk.length();
        let mut at = offset;
        if at >= length {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        while at < length {
            let extent = self.disk.block_status(ByteRange::between(at, length))?;
            let is_data = extent.allocation == Allocation::Data;
            if is_data == (wanted == Allocation::Data) {
                return Ok(at);
            }
            at = extent.range.end();
        }
        match wanted {
            Allocation::Data => Err(io::Error::from_raw_os_error(libc::ENXIO)),
            _ => Ok(length),
        }
    }
}

impl Filesystem for File {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // What an old kernel lacks costs speed alone.
        let _ = config.set_max_write(MAX_WRITE);
        let _ = config.set_max_background(MAX_BACKGROUND);
        for flag in [InitFlags::FUSE_MAX_PAGES, InitFlags::FUSE_ASYNC_DIO] {
            let _ = config.add_capabilities(flag);
        }
        Ok(())
    }

    fn getattr(&self, _: &Request, _: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes() {
            Ok(attributes) => reply.attr(&NO_TIME, &attributes),
            Err(e) => reply.error(e.into()),
        }
    }

    /// Times are the image's, whatever is said; its size, owner and mode stay.
    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<fuser::TimeOrNow>,
        _: Option<fuser::TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let now = match self.attributes() {
            Ok(now) => now,
            Err(e) => return reply.error(e.into()),
        };
        let stays = size.is_none_or(|size| size == now.size)
            && mode.is_none_or(|mode| mode & 0o7777 == u32::from(now.perm))
            && uid.is_none_or(|uid| uid == now.uid)
            && gid.is_none_or(|gid| gid == now.gid);
        if stays { reply.attr(&NO_TIME, &now) } else { reply.error(Errno::EPERM) }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if self.work.is_closed() {
            return reply.error(Errno::ESHUTDOWN);
        }
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(_turn) = self.work.begin() else { return reply.error(Errno::ESHUTDOWN) };
        let inside = self.disk.length().saturating_sub(offset).min(size.into()) as usize;
        BUFFER.with_borrow_mut(|buffer| {
            // At the end, and behind it, too.
            if inside == 0 {
                return reply.data(&[]);
            }
            if buffer.len() < inside {
                buffer.resize(inside, 0);
            }
            match self.disk.read(&mut buffer[..inside], offset) {
                Ok(()) => reply.data(&buffer[..inside]),
                Err(e) => reply.error(e.into()),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(turn) = self.work.begin() else { return reply.error(Errno::ESHUTDOWN) };
        let inside = self.disk.length().saturating_sub(offset).min(data.len() as u64) as usize;
        if inside == 0 && !data.is_empty() {
            return reply.error(Errno::ENOSPC);
        }
        let answer = move |written: io::Result<()>, length: usize| match written {
            Ok(()) => reply.written(length as u32),
            Err(e) => reply.error(e.into()),
        };
        // Past the page cache the kernel sends no flush after it. O_SYNC has this bit, too; so has RWF_DSYNC.
        let is_durable = flags.0 & libc::O_DSYNC != 0;
        let write = move |disk: &Disk, data: &[u8]| {
            disk.write(data, offset)?;
            if is_durable { disk.flush() } else { Ok(()) }
        };
        if let Some(_place) = self.work.place() {
            return answer(write(&self.disk, &data[..inside]), inside);
        }
        let (disk, data) = (self.disk.clone(), data[..inside].to_vec());
        self.work.hand_over(data.len(), move || {
            answer(write(&disk, &data), data.len());
            drop(turn);
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let Some(turn) = self.work.begin() else { return reply.error(Errno::ESHUTDOWN) };
        self.change(turn, 0, move |disk| tell(disk.flush(), reply));
    }

    /// Closing a file flushes nothing: writes are on the disk, or lost, when they return.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(turn) = self.work.begin() else { return reply.error(Errno::ESHUTDOWN) };
        match self.allocate(offset, length, mode) {
            Ok((range, may_unmap)) => {
                self.change(turn, 0, move |disk| tell(disk.write_zeroes(range, may_unmap), reply))
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let wanted = match whence {
            libc::SEEK_DATA => Allocation::Data,
            libc::SEEK_HOLE => Allocation::Zero,
            _ => return reply.error(Errno::EINVAL),
        };
        let Some(_turn) = self.work.begin() else { return reply.error(Errno::ESHUTDOWN) };
        let found = u64::try_from(offset).map_err(|_| libc::ENXIO);
        match found.map_err(io::Error::from_raw_os_error).and_then(|offset| self.seek(offset, wanted)) {
            Ok(at) => reply.offset(at as i64),
            Err(e) => reply.error(e.into()),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let block = self.disk.sizes().preferred;
        reply.statfs(self.disk.length() / u64::from(block), 0, 0, 1, 0, block, 255, block);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    /// The kernel then copies by reading and writing.
    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }
}

fn tell(done: io::Result<()>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e.into()),
    }
}
