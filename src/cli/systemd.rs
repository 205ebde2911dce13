//! What systemd wants to know of a service of Type=notify. Without systemd nothing happens.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Clients may come; the instant of a backup is taken.
pub const READY: &str = "READY=1";
/// It is about to end.
pub const STOPPING: &str = "STOPPING=1";

/// Somebody listens.
pub fn is_there() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Tells how a job stands every second, which is what a watchdog of two seconds and more wants.
#[derive(Debug, Default)]
pub struct Heartbeat {
    next: Duration,
}

impl Heartbeat {
    /// At `elapsed`, an ascending time, with `line` if it is time for it.
    pub fn beat(&mut self, elapsed: Duration, line: impl FnOnce() -> String) {
        if elapsed >= self.next {
            self.next = elapsed + Duration::from_secs(1);
            tell(&format!("WATCHDOG=1\nSTATUS={}", line()));
        }
    }
}

/// Tells `state` to whoever is named by NOTIFY_SOCKET. Never blocks: a service manager that does not listen gets nothing.
pub fn tell(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        path => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path)),
    };
    let send = |address: SocketAddr| {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.send_to_addr(state.as_bytes(), &address)
    };
    // It is a courtesy: who waits for it says in time that it did not come.
    let _ = address.and_then(send);
}
