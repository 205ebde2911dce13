//! Packets and descriptors over a SOCK_SEQPACKET Unix socket.

use super::packet::{Malformed, PACKET, Packet};
use nix::sys::socket::UnixCredentials;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::fs::Mode;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// Descriptors that one packet may bring.
const MOST_DESCRIPTORS: usize = 2;

/// What a peer sent.
#[derive(Debug)]
pub enum Received {
    /// A packet, and the descriptors that came with it.
    Packet(Packet, Vec<OwnedFd>),
    /// Something else.
    Malformed(Malformed),
    /// The peer is gone.
    HungUp,
}

fn socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// A socket bound to `path` and listening. `accept` on it does not block.
///
/// Its file is sticky, which it gets from the unbound socket: whatever cleans folders of temporary files leaves those alone that are
/// (systemd-tmpfiles; XDG Base Directory Specification, XDG_RUNTIME_DIR), and nothing else tells it that this one is in use.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let mode = Mode::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode);
    rustix::fs::fchmod(&socket, mode | Mode::SVTX)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 16)?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

/// Connects to `path`; that, and each later call on the socket, blocks for `timeout` at most.
pub fn connect(path: &Path, timeout: Duration) -> io::Result<OwnedFd> {
    let socket = socket()?;
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(timeout))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// The next connection, if there is one; none of its calls blocks.
pub fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?)
}

/// Who is at the other end. Its process is 0 where our namespace does not have it: a container beside or around ours. rustix
/// takes that for an error.
pub fn peer(socket: impl AsFd) -> io::Result<UnixCredentials> {
    Ok(nix::sys::socket::getsockopt(&socket.as_fd(), PeerCredentials)?)
}

/// Sends a packet. Does not block: a peer whose buffer is full has not read a dozen packets, and is refused.
pub fn send(socket: impl AsFd, packet: &Packet, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)), "as many as there is space for");
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(&packet.encode())], &mut control, flags)?;
    Ok(())
}

/// Receives a packet, within the socket's time-out; on a socket that does not block, `WouldBlock` when there is none.
pub fn receive(socket: impl AsFd) -> io::Result<Received> {
    // One byte more than a packet, so that a longer one shows.
    let mut bytes = [0; PACKET + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut was_reset = false;
    let received = loop {
        let buffers = &mut [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(&socket, buffers, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            // The peer closed with something of ours unread. That is said first and once; what it sent before it did
            // is still there.
            Err(rustix::io::Errno::CONNRESET) if !was_reset => was_reset = true,
            Err(rustix::io::Errno::CONNRESET) => return Ok(Received::HungUp),
            other => break other?,
        }
    };
    let descriptors: Vec<_> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 && descriptors.is_empty() {
        return Ok(Received::HungUp);
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Ok(Received::Malformed(Malformed::Field("number of descriptors")));
    }
    Ok(match Packet::decode(&bytes[..received.bytes]) {
        Ok(packet) => Received::Packet(packet, descriptors),
        Err(malformed) => Received::Malformed(malformed),
    })
}

/// Ends a connection for both ends, whoever else holds the descriptor.
pub fn hang_up(socket: impl AsFd) {
    // Fails only when the peer was faster.
    let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    #[test]
    fn a_packet_arrives_with_its_descriptors() {
        let (a, b) = pair();
        let file = tempfile::tempfile().unwrap();
        send(&a, &Packet::Freeze, &[file.as_fd(), file.as_fd()]).unwrap();
        send(&a, &Packet::Detach, &[]).unwrap();
        let Received::Packet(Packet::Freeze, descriptors) = receive(&b).unwrap() else { panic!() };
        assert_eq!(descriptors.len(), 2);
        assert!(matches!(receive(&b).unwrap(), Received::Packet(Packet::Detach, none) if none.is_empty()));
        assert_eq!(receive(&b).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert!(matches!(receive(&b).unwrap(), Received::HungUp));
    }

    #[test]
    fn what_is_no_packet_is_told_from_a_hang_up() {
        let (a, b) = pair();
        for bytes in [&[1_u8; 63][..], &[1; 65], &[1; 4096]] {
            rustix::net::send(&a, bytes, SendFlags::empty()).unwrap();
            assert!(matches!(receive(&b).unwrap(), Received::Malformed(Malformed::Length(_))));
        }
        hang_up(&a);
        assert!(matches!(receive(&b).unwrap(), Received::HungUp));
    }

    #[test]
    fn more_descriptors_than_any_packet_has_are_refused() {
        let (a, b) = pair();
        let file = tempfile::tempfile().unwrap();
        let many = [file.as_fd(); 9];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        let bytes = Packet::Freeze.encode();
        rustix::net::sendmsg(&a, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
        assert!(matches!(receive(&b).unwrap(), Received::Malformed(_)));
    }

    #[test]
    fn the_last_words_of_a_peer_that_read_nothing_are_heard() {
        let (a, b) = pair();
        send(&a, &Packet::Freeze, &[]).unwrap();
        send(&b, &Packet::Refused { errno: 16 }, &[]).unwrap();
        drop(b);
        assert!(matches!(receive(&a).unwrap(), Received::Packet(Packet::Refused { errno: 16 }, _)));
        assert!(matches!(receive(&a).unwrap(), Received::HungUp));
    }

    #[test]
    fn a_full_peer_does_not_block_the_sender() {
        let (a, _b) = pair();
        let failed = (0..100_000).find_map(|_| send(&a, &Packet::Freeze, &[]).err());
        assert_eq!(failed.unwrap().kind(), io::ErrorKind::WouldBlock);
    }
}
