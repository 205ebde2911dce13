//! The access control list and the extended attributes of a file that is replaced, for the one that replaces it.

use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};
use rustix::io::{Errno, Result};
use std::ffi::CString;
use std::fs::File;

/// Linux's limits of a list of names and of a value, in bytes.
const MOST: usize = 64 << 10;
/// Who may what, beside owner, group and others.
pub const ACCESS_LIST: &str = "system.posix_acl_access";
/// What these say of a file's content is not true of another content; the kernel takes them away at a write.
const OF_CONTENT: [&str; 3] = ["security.capability", "security.ima", "security.evm"];

/// Gives `new` the attributes of `old`, and takes from it a list that only its folder gave it. Returns what was not kept, and why.
pub fn keep(old: &File, new: &File) -> Vec<(String, Errno)> {
    let names = match names(old) {
        Ok(names) => names,
        Err(errno) => return vec![("*".to_owned(), errno)],
    };
    let is_kept = |name: &&CString| !OF_CONTENT.iter().any(|of_content| name.as_bytes() == of_content.as_bytes());
    let copied = names.iter().filter(is_kept).map(|name| (name.to_string_lossy().into_owned(), copy(old, new, name)));
    let mut lost: Vec<_> = copied.filter_map(|(name, result)| Some((name, result.err()?))).collect();
    if !names.iter().any(|name| name.as_bytes() == ACCESS_LIST.as_bytes()) {
        // The old file granted nothing of what the folder's default list would.
        match fremovexattr(new, ACCESS_LIST) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(errno) => lost.push((ACCESS_LIST.to_owned(), errno)),
        }
    }
    lost
}

/// Whether more is said of who may what than its mode. Where that can't be read, it may be.
#[cfg(feature = "fuse")]
pub fn has_access_list(file: &File) -> bool {
    let none = [Errno::NODATA, Errno::OPNOTSUPP, Errno::NOSYS];
    !fgetxattr(file, ACCESS_LIST, &mut [0_u8; 256][..]).is_err_and(|errno| none.contains(&errno))
}

fn names(file: &File) -> Result<Vec<CString>> {
    let mut list = vec![0; MOST];
    let length = match flistxattr(file, &mut list[..]) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => 0,
        found => found?,
    };
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.filter_map(|name| CString::new(name).ok()).collect())
}

fn copy(old: &File, new: &File, name: &CString) -> Result<()> {
    let value = match value(old, name) {
        // Gone meanwhile.
        Err(Errno::NODATA) => return Ok(()),
        found => found?,
    };
    // A label that it has already may be one that we could not set.
    if self::value(new, name).is_ok_and(|own| own == value) {
        return Ok(());
    }
    fsetxattr(new, name, &value, XattrFlags::empty())
}

fn value(file: &File, name: &CString) -> Result<Vec<u8>> {
    let mut value = vec![0; MOST];
    let length = fgetxattr(file, name, &mut value[..])?;
    value.truncate(length);
    Ok(value)
}
