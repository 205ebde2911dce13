//! What a process that reads images from strangers can't do any more, should one of them get hold of it.
//!
//! Best effort: where the kernel has neither Landlock nor seccomp filters, nothing is held, and a copy is made all the same.
//!
//! | who | from when on | has no more |
//! |---|---|---|
//! | a thread that reads an image ([`enter`]) | its start | programs, and files by name and sockets, but for reading and connecting where an end is a server's |
//! | the whole process ([`shut_process`]) | everything is open, and no program is needed any more | programs, and what changes the machine |
//!
//! Threads share their memory, so that what a thread is denied stops an exploit's ordinary ways and not every one. What the
//! process is denied it is denied for good. Children would inherit both, and so neither is for threads or processes that start
//! programs for others: hooks, qemu-nbd.

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus};
use nix::libc;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::LazyLock;

/// What the ends of a copy need while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Files and devices that are open.
    Nothing,
    /// A server, of whose connections one may be made anew: names are looked up for that, in files and over sockets.
    Servers,
}

/// What the kernel took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Landlock: files by name, and ports.
    pub files: bool,
    /// A seccomp filter: system calls.
    pub calls: bool,
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.files, self.calls) {
            (true, true) => "Landlock and seccomp",
            (true, false) => "Landlock",
            (false, true) => "seccomp",
            (false, false) => "nothing: this kernel has neither Landlock nor seccomp filters",
        })
    }
}

thread_local! {
    static HELD: Cell<Option<Held>> = const { Cell::new(None) };
}

/// Holds the calling thread, and every thread that it starts, for good; once, later calls only say what was taken. It can set
/// no user-id bit free any more (`no_new_privs`).
pub fn enter(reach: Reach) -> Held {
    HELD.get().unwrap_or_else(|| {
        // Landlock first: its calls are among those that nobody needs afterwards.
        let files = hold_files(reach).unwrap_or(false);
        let filter = match reach {
            Reach::Nothing => &*OF_READERS,
            Reach::Servers => &*OF_CLIENTS,
        };
        let calls = filter.as_ref().is_some_and(|filter| seccompiler::apply_filter(filter).is_ok());
        let held = Held { files, calls };
        HELD.set(Some(held));
        held
    })
}

/// What [`enter`] takes on this kernel, tried by a thread that ends.
pub fn offered() -> Held {
    let tried = std::thread::Builder::new().name("sandbox".into()).spawn(|| enter(Reach::Nothing));
    tried.ok().and_then(|thread| thread.join().ok()).unwrap_or_default()
}

/// Holds every thread of the process, those to come too, for good: no program can be started, no file system mounted, no kernel
/// module loaded, no other process traced. False: the kernel did not take it, or one of the threads has a filter of its own
/// already ([`enter`] comes later).
pub fn shut_process() -> bool {
    OF_PROCESS.as_ref().is_some_and(|filter| seccompiler::apply_filter_all_threads(filter).is_ok())
}

/// Files that are open already stay as they are.
fn hold_files(reach: Reach) -> Result<bool, landlock::RulesetError> {
    // Rights that this kernel does not know are left out.
    let ruleset = match reach {
        Reach::Nothing => Ruleset::default()
            .handle_access(AccessFs::from_all(ABI::V5))?
            .handle_access(AccessNet::BindTcp | AccessNet::ConnectTcp)?,
        Reach::Servers => Ruleset::default()
            .handle_access(AccessFs::from_write(ABI::V5) | AccessFs::Execute)?
            .handle_access(AccessNet::BindTcp)?,
    };
    let status = ruleset.create()?.restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

static OF_PROCESS: LazyLock<Option<BpfProgram>> = LazyLock::new(|| denying(&[NEVER]));
static OF_CLIENTS: LazyLock<Option<BpfProgram>> = LazyLock::new(|| denying(&[NEVER, BY_NAME]));
static OF_READERS: LazyLock<Option<BpfProgram>> = LazyLock::new(|| denying(&[NEVER, BY_NAME, PEERS]));

/// A filter that lets everything pass but these, which fail with EPERM. `None` on a machine that has no such filters.
fn denying(lists: &[&[libc::c_long]]) -> Option<BpfProgram> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).ok()?;
    let denied = lists.iter().flat_map(|list| list.iter().copied()).chain(X32.iter().copied());
    // The same by the numbers of x32, which are another way to the same calls.
    let rules: BTreeMap<i64, Vec<_>> =
        denied.flat_map(|call| [call, call | X32_BIT]).map(|call| (call, Vec::new())).collect();
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, refused, arch).ok()?.try_into().ok()
}

/// Programs, other processes, other rights, and what changes the machine.
const NEVER: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_open_by_handle_at,
    libc::SYS_personality,
    libc::SYS_quotactl,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
];

/// What is done to a file by its name and that Landlock does not know, and to other processes.
const BY_NAME: &[libc::c_long] = &[
    libc::SYS_fchmodat,
    libc::SYS_fchmodat2,
    libc::SYS_fchownat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_utimensat,
    libc::SYS_mknodat,
    libc::SYS_kill,
    libc::SYS_pidfd_send_signal,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
];

/// New connections.
const PEERS: &[libc::c_long] = &[
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
];

#[cfg(target_arch = "x86_64")]
const X32_BIT: i64 = 0x4000_0000;
#[cfg(not(target_arch = "x86_64"))]
const X32_BIT: i64 = 0;

/// Calls that have numbers of their own in x32 (asm/unistd_x32.h): execve, ptrace, kexec_load, process_vm_readv and _writev,
/// execveat.
#[cfg(target_arch = "x86_64")]
const X32: &[libc::c_long] =
    &[X32_BIT | 520, X32_BIT | 521, X32_BIT | 528, X32_BIT | 539, X32_BIT | 540, X32_BIT | 545];
#[cfg(not(target_arch = "x86_64"))]
const X32: &[libc::c_long] = &[];

#[cfg(test)]
mod tests;
