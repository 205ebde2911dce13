//! Where an NBD export is, as the NBD URI specification writes it (doc/uri.md of the NBD project).

use crate::error::{Error, Kind};
use percent_encoding::percent_decode_str;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::str::FromStr;

/// The port that IANA gave to NBD.
pub const DEFAULT_PORT: u16 = 10809;
/// Bytes of an export's name at most: the protocol's limit for strings.
const NAME_LIMIT: usize = 4096;
/// Bytes of a Unix socket's path at most, without the final zero.
const SOCKET_PATH_LIMIT: usize = 107;

/// An export of an NBD server: `nbd://`, `nbds://`, `nbd+unix://` or `nbds+unix://`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Uri {
    /// Where the server listens.
    pub address: Address,
    /// The export's name; empty: the server's default one.
    pub export: String,
    /// TLS, without which nothing is sent; `None`: in the clear.
    pub tls: Option<TlsChoice>,
    /// As it was given.
    text: String,
}

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP.
    Tcp {
        /// A name or a number; an IPv6 address without its brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// What a URI says of TLS.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TlsChoice {
    /// `tls-certificates`: a folder in QEMU's layout.
    pub certificates: Option<PathBuf>,
    /// `tls-verify-peer`: the server must prove who it is. True unless the URI says otherwise.
    pub verify_peer: bool,
    /// The name that the server's certificate must have: `tls-hostname`, else the host, else `localhost`.
    pub server_name: String,
}

impl Uri {
    /// As it was given.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Errors are of [`Kind::Usage`], one line that names the part that is wrong. What may be a secret (a password before
/// the host) is never repeated.
impl FromStr for Uri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Parts::split(text).and_then(|parts| parts.read(text)).map_err(|why| {
            let shown = without_user(text);
            Error::new(Kind::Usage, format!("NBD URI '{shown}': {why}"))
        })
    }
}

/// A URI cut at its punctuation, still encoded.
struct Parts<'a> {
    scheme: String,
    authority: &'a str,
    path: &'a str,
    query: &'a str,
}

/// The parameters that are known.
#[derive(Default)]
struct Query {
    socket: Option<PathBuf>,
    certificates: Option<PathBuf>,
    verify_peer: Option<bool>,
    hostname: Option<String>,
}

impl<'a> Parts<'a> {
    fn split(text: &'a str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once(':').ok_or("it has no scheme")?;
        let rest = rest.strip_prefix("//").ok_or_else(|| format!("'//' must follow '{scheme}:'"))?;
        if rest.contains('#') {
            return Err("it has a fragment ('#'); in a name write %23".to_owned());
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        Ok(Self { scheme: scheme.to_ascii_lowercase(), authority, path, query })
    }

    fn read(&self, text: &str) -> Result<Uri, String> {
        let (is_unix, is_tls) = match self.scheme.as_str() {
            "nbd" => (false, false),
            "nbds" => (false, true),
            "nbd+unix" => (true, false),
            "nbds+unix" => (true, true),
            "nbd+vsock" | "nbds+vsock" => return Err("vsock is not supported".to_owned()),
            other => return Err(format!("unknown scheme '{other}' (known: nbd, nbds, nbd+unix, nbds+unix)")),
        };
        if self.authority.contains('@') {
            return Err("a user name is for TLS with pre-shared keys, which is not supported".to_owned());
        }
        let query = Query::read(self.query)?;
        let export = decoded(self.path, "export name")?;
        if export.len() > NAME_LIMIT {
            return Err(format!("the export name is longer than {NAME_LIMIT} bytes"));
        }
        let address = if is_unix { self.socket(query.socket.clone())? } else { self.host(&query)? };
        let tls = query.tls(is_tls, &address)?;
        Ok(Uri { address, export, tls, text: text.to_owned() })
    }

    fn socket(&self, socket: Option<PathBuf>) -> Result<Address, String> {
        if !self.authority.is_empty() {
            return Err("a Unix socket has no host: three slashes, then the export's name".to_owned());
        }
        let path = socket.filter(|path| !path.as_os_str().is_empty()).ok_or("socket=PATH is missing")?;
        if path.as_os_str().len() > SOCKET_PATH_LIMIT {
            return Err(format!("the socket's path is longer than {SOCKET_PATH_LIMIT} bytes"));
        }
        Ok(Address::Unix(path))
    }

    fn host(&self, query: &Query) -> Result<Address, String> {
        if query.socket.is_some() {
            return Err(format!("socket=PATH is for {}+unix", self.scheme));
        }
        let (host, port) = match self.authority.strip_prefix('[') {
            Some(rest) => {
                let (host, after) = rest.split_once(']').ok_or("the bracket of an IPv6 address is not closed")?;
                (host, after.strip_prefix(':').or(after.is_empty().then_some("")).ok_or("a port follows ']:'")?)
            }
            None => self.authority.rsplit_once(':').unwrap_or((self.authority, "")),
        };
        let host = decoded(host, "host")?;
        if host.is_empty() {
            return Err("the host is missing".to_owned());
        }
        let port = match port {
            "" => DEFAULT_PORT,
            text => match text.parse() {
                Ok(port) if port != 0 && text.bytes().all(|b| b.is_ascii_digit()) => port,
                _ => return Err(format!("'{text}' is no port")),
            },
        };
        Ok(Address::Tcp { host, port })
    }
}

impl Query {
    fn read(text: &str) -> Result<Self, String> {
        let mut query = Self::default();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| format!("'{pair}' is not NAME=VALUE"))?;
            let is_new = match key {
                "socket" => query.socket.replace(decoded_path(value, key)?).is_none(),
                "tls-certificates" => query.certificates.replace(decoded_path(value, key)?).is_none(),
                "tls-hostname" => query.hostname.replace(decoded(value, key)?).is_none(),
                "tls-verify-peer" => query.verify_peer.replace(truth(value, key)?).is_none(),
                "tls-psk-file" | "tls-username" => {
                    return Err(format!("{key}: TLS with pre-shared keys is not supported"));
                }
                _ => {
                    let known = "socket, tls-certificates, tls-hostname, tls-verify-peer";
                    return Err(format!("unknown parameter '{key}' (known: {known})"));
                }
            };
            if !is_new {
                return Err(format!("{key} is given twice"));
            }
        }
        Ok(query)
    }

    fn tls(self, is_tls: bool, address: &Address) -> Result<Option<TlsChoice>, String> {
        if !is_tls {
            let has_any = self.certificates.is_some() || self.hostname.is_some() || self.verify_peer.is_some();
            return if has_any { Err("tls-… parameters are for nbds and nbds+unix".to_owned()) } else { Ok(None) };
        }
        let host = match address {
            Address::Tcp { host, .. } => host.clone(),
            Address::Unix(_) => "localhost".to_owned(),
        };
        let verify_peer = self.verify_peer.unwrap_or(true);
        if verify_peer && self.certificates.is_none() {
            return Err("tls-certificates=DIR is missing: the folder with ca-cert.pem".to_owned());
        }
        let server_name = self.hostname.unwrap_or(host);
        Ok(Some(TlsChoice { certificates: self.certificates, verify_peer, server_name }))
    }
}

fn truth(value: &str, key: &str) -> Result<bool, String> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err(format!("{key} is true or false")),
    }
}

fn decoded_bytes(text: &str, what: &str) -> Result<Vec<u8>, String> {
    let bytes = text.as_bytes();
    let is_hex = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_hexdigit);
    if (0..bytes.len()).any(|at| bytes[at] == b'%' && !(is_hex(at + 1) && is_hex(at + 2))) {
        return Err(format!("{what}: '%' is followed by two hex digits, %25 is a per cent sign"));
    }
    let found: Vec<u8> = percent_decode_str(text).collect();
    if found.contains(&0) { Err(format!("{what}: it has a zero byte")) } else { Ok(found) }
}

fn decoded(text: &str, what: &str) -> Result<String, String> {
    String::from_utf8(decoded_bytes(text, what)?).map_err(|_| format!("{what}: it is not UTF-8"))
}

fn decoded_path(text: &str, what: &str) -> Result<PathBuf, String> {
    Ok(PathBuf::from(OsString::from_vec(decoded_bytes(text, what)?)))
}

/// `text` with what stands before an `@` of the host left out.
fn without_user(text: &str) -> String {
    let start = text.find("//").map_or(0, |at| at + 2);
    let authority = &text[start..];
    let authority = &authority[..authority.find(['/', '?', '#']).unwrap_or(authority.len())];
    match authority.rfind('@') {
        Some(at) => format!("{}…{}", &text[..start], &text[start + at..]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.to_owned(), port }
    }

    fn refusal(text: &str) -> String {
        let error = text.parse::<Uri>().expect_err(text);
        assert_eq!(error.kind(), Kind::Usage);
        error.to_string()
    }

    #[test]
    fn the_forms_of_the_specification_are_read() {
        for (text, address, export) in [
            ("nbd://example.com", tcp("example.com", 10809), ""),
            ("nbd://example.com/", tcp("example.com", 10809), ""),
            ("NBD://example.com:1/disk", tcp("example.com", 1), "disk"),
            ("nbd://localhost:/a/b//", tcp("localhost", 10809), "a/b//"),
            ("nbd://[::1]", tcp("::1", 10809), ""),
            ("nbd://[fe80::1]:7/x", tcp("fe80::1", 7), "x"),
            ("nbd://h/%66%C3%BC%3f", tcp("h", 10809), "fü?"),
            ("nbd+unix:///?socket=/tmp/s", Address::Unix("/tmp/s".into()), ""),
            ("nbd+unix://?socket=%2Ftmp%2Fa%20b", Address::Unix("/tmp/a b".into()), ""),
            ("nbd+unix:///name?socket=s", Address::Unix("s".into()), "name"),
        ] {
            let found = uri(text);
            assert_eq!((&found.address, found.export.as_str(), &found.tls), (&address, export, &None), "{text}");
            assert_eq!((found.to_string().as_str(), found.text()), (text, text));
        }
    }

    #[test]
    fn an_address_is_shown_as_people_write_it() {
        for (address, text) in [
            (tcp("example.com", 1), "example.com:1"),
            (tcp("::1", 10809), "[::1]:10809"),
            (Address::Unix("/tmp/s".into()), "unix:/tmp/s"),
        ] {
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn names_and_paths_may_be_as_long_as_the_system_takes_them() {
        let (name, path) = ("x".repeat(NAME_LIMIT), "s".repeat(SOCKET_PATH_LIMIT));
        assert_eq!(uri(&format!("nbd://h/{name}")).export, name);
        let text = format!("nbd+unix://?socket={path}");
        assert_eq!(uri(&text).address, Address::Unix(path.into()));
        assert!(refusal(&format!("{text}s")).ends_with("the socket's path is longer than 107 bytes"));
    }

    #[test]
    fn tls_verifies_the_server_unless_told_otherwise() {
        let tls = |text: &str| uri(text).tls.expect("TLS");
        let found = tls("nbds://h/x?tls-certificates=/etc/pki");
        assert_eq!((found.certificates, found.verify_peer), (Some("/etc/pki".into()), true));
        assert_eq!(found.server_name, "h");
        assert_eq!(tls("nbds+unix:///x?socket=s&tls-certificates=c").server_name, "localhost");
        assert_eq!(tls("nbds+unix:///?socket=s&tls-certificates=c&tls-hostname=h2").server_name, "h2");
        for (word, verifies) in
            [("false", false), ("NO", false), ("0", false), ("true", true), ("On", true), ("1", true)]
        {
            let found = tls(&format!("nbds://h?tls-certificates=c&tls-verify-peer={word}"));
            assert_eq!(found.verify_peer, verifies, "{word}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        for (text, why) in [
            ("nbd:unix:/s", "'//' must follow 'nbd:'"),
            ("nbd+vsock://2", "vsock is not supported"),
            ("nbdx://h", "unknown scheme 'nbdx' (known: nbd, nbds, nbd+unix, nbds+unix)"),
            ("nbd://", "the host is missing"),
            ("nbd:///x", "the host is missing"),
            ("nbd://h:0", "'0' is no port"),
            ("nbd://h:+1", "'+1' is no port"),
            ("nbd://h:65536", "'65536' is no port"),
            ("nbd://[::1", "the bracket of an IPv6 address is not closed"),
            ("nbd://[::1]7", "a port follows ']:'"),
            ("nbd://h/%zz", "export name: '%' is followed by two hex digits, %25 is a per cent sign"),
            ("nbd://h/%0", "export name: '%' is followed by two hex digits, %25 is a per cent sign"),
            ("nbd://h/%00", "export name: it has a zero byte"),
            ("nbd://h/%ff", "export name: it is not UTF-8"),
            ("nbd://h/a#b", "it has a fragment ('#'); in a name write %23"),
            ("nbd://h?socket=s", "socket=PATH is for nbd+unix"),
            ("nbd+unix:///x", "socket=PATH is missing"),
            ("nbd+unix://h/x?socket=s", "a Unix socket has no host: three slashes, then the export's name"),
            ("nbd+unix:///x?socket=s&socket=t", "socket is given twice"),
            ("nbd://h?a=b", "unknown parameter 'a' (known: socket, tls-certificates, tls-hostname, tls-verify-peer)"),
            ("nbd://h?tls-verify-peer=false", "tls-… parameters are for nbds and nbds+unix"),
            ("nbd://h?tls-hostname=x", "tls-… parameters are for nbds and nbds+unix"),
            ("nbd://h?tls-certificates=c", "tls-… parameters are for nbds and nbds+unix"),
            ("nbds://h", "tls-certificates=DIR is missing: the folder with ca-cert.pem"),
            ("nbds://h?tls-psk-file=f", "tls-psk-file: TLS with pre-shared keys is not supported"),
            ("nbds://h?tls-verify-peer=perhaps", "tls-verify-peer is true or false"),
            ("nbds://h?x", "'x' is not NAME=VALUE"),
        ] {
            assert_eq!(refusal(text), format!("NBD URI '{text}': {why}"));
        }
        let long = format!("nbd://h/{}", "x".repeat(4097));
        assert!(refusal(&long).ends_with("the export name is longer than 4096 bytes"));
    }

    #[test]
    fn a_password_is_never_repeated() {
        assert_eq!(
            refusal("nbds://alice:secret@h/x"),
            "NBD URI 'nbds://…@h/x': a user name is for TLS with pre-shared keys, which is not supported"
        );
        assert!(!refusal("nbdx://alice:secret@h/x").contains("secret"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(nbds?(\\+unix)?://)?[\\PC]{0,60}") {
            let _ = text.parse::<Uri>();
        }
    }
}
