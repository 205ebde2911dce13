//! The name of a file in JSON.

use serde::Serialize;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A path; `path_b64` only where it is not UTF-8, and `path` is then lossy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PathName {
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_b64: Option<String>,
}

impl PathName {
    /// The name of `path`.
    pub fn of(path: &Path) -> Self {
        let path_b64 = path.to_str().is_none().then(|| base64(path.as_os_str().as_bytes()));
        Self { path: path.to_string_lossy().into_owned(), path_b64 }
    }
}

/// RFC 4648, section 4, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let bits = three.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for digit in 0..4 {
            let sextet = bits >> (18 - 6 * digit) & 0x3f;
            text.push(if digit <= three.len() { char::from(DIGITS[sextet as usize]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn base64_matches_the_rfc() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfd]), "//79");
    }

    #[test]
    fn a_path_that_is_not_utf8_keeps_its_bytes() {
        assert_eq!(serde_json::to_string(&PathName::of(Path::new("a b"))).unwrap(), r#"{"path":"a b"}"#);
        let odd = PathName::of(Path::new(OsStr::from_bytes(b"a\xff")));
        assert_eq!(serde_json::to_string(&odd).unwrap(), "{\"path\":\"a\u{fffd}\",\"path_b64\":\"Yf8=\"}");
    }
}
