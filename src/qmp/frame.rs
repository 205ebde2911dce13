//! Cuts what a client sends into JSON values: they follow each other with or without white space, and strings may stand in
//! single quotes, as in QEMU. Bounded in size and depth, whatever comes.

/// Bytes of one value.
const MOST_BYTES: usize = 256 << 10;
/// Brackets within brackets.
const MOST_DEPTH: usize = 100;

/// What was cut off.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// The text of one value; it may be wrong inside.
    Value(Vec<u8>),
    /// Beyond a bound: nothing that follows can be understood.
    TooMuch(&'static str),
}

/// The state between two bytes.
#[derive(Debug, Default)]
pub struct Cutter {
    text: Vec<u8>,
    depth: usize,
    quote: Option<u8>,
    escaped: bool,
}

impl Cutter {
    /// Takes the next byte; gives what ends with it.
    pub fn push(&mut self, byte: u8) -> Option<Piece> {
        if self.text.len() >= MOST_BYTES {
            return Some(Piece::TooMuch("JSON token size limit exceeded"));
        }
        match (self.quote, byte) {
            (Some(quote), _) => {
                self.in_string(quote, byte);
                // A string on its own is a value.
                (self.quote.is_none() && self.depth == 0).then(|| self.take())
            }
            (None, b'"' | b'\'') => {
                self.quote = Some(byte);
                self.text.push(b'"');
                None
            }
            (None, b'{' | b'[') => {
                self.depth += 1;
                self.text.push(byte);
                (self.depth > MOST_DEPTH).then_some(Piece::TooMuch("JSON nesting depth limit exceeded"))
            }
            (None, b'}' | b']') => {
                self.depth = self.depth.saturating_sub(1);
                self.text.push(byte);
                (self.depth == 0).then(|| self.take())
            }
            // Outside of everything white space ends a word, and begins nothing.
            (None, b' ' | b'\t' | b'\r' | b'\n') if self.depth == 0 => (!self.text.is_empty()).then(|| self.take()),
            (None, _) => {
                self.text.push(byte);
                None
            }
        }
    }

    fn in_string(&mut self, quote: u8, byte: u8) {
        if self.escaped {
            self.escaped = false;
            // JSON knows no \'.
            if byte == b'\'' {
                self.text.pop();
            }
            self.text.push(byte);
        } else if byte == b'\\' {
            self.escaped = true;
            self.text.push(byte);
        } else if byte == quote {
            self.quote = None;
            self.text.push(b'"');
        } else {
            if byte == b'"' {
                self.text.push(b'\\');
            }
            self.text.push(byte);
        }
    }

    fn take(&mut self) -> Piece {
        Piece::Value(std::mem::take(&mut self.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &[u8]) -> Vec<String> {
        let mut cutter = Cutter::default();
        let pieces = text.iter().filter_map(|byte| cutter.push(*byte));
        pieces
            .map(|piece| match piece {
                Piece::Value(text) => String::from_utf8_lossy(&text).into_owned(),
                Piece::TooMuch(why) => why.to_owned(),
            })
            .collect()
    }

    #[test]
    fn values_follow_each_other_however_they_are_set() {
        assert_eq!(cut(b"{\"a\":1}{\"b\":[2]}\r\n 5 x\n[]"), ["{\"a\":1}", "{\"b\":[2]}", "5", "x", "[]"]);
        assert_eq!(cut(b"{'a':'}\"\\'{'}"), ["{\"a\":\"}\\\"'{\"}"]);
        assert_eq!(cut(b"{\"a\":\"\\\"}\"}"), ["{\"a\":\"\\\"}\"}"]);
        assert_eq!(cut(b"{\n\"a\" :\n1 }"), ["{\n\"a\" :\n1 }"]);
        assert_eq!(cut(b"}]{}"), ["}", "]", "{}"]);
        assert!(cut(b"{\"half\": \"").is_empty() && cut(b"\r\n\t ").is_empty());
    }

    #[test]
    fn depth_and_size_are_bounded() {
        let deep = vec![b'['; MOST_DEPTH + 1];
        assert_eq!(cut(&deep), ["JSON nesting depth limit exceeded"]);
        let mut cutter = Cutter::default();
        let first = (0..).find_map(|count| cutter.push(b'1').map(|piece| (count, piece)));
        assert_eq!(first, Some((MOST_BYTES, Piece::TooMuch("JSON token size limit exceeded"))));
    }

    #[test]
    fn any_bytes_are_survived() {
        let mut state = 1_u32;
        let mut cutter = Cutter::default();
        for _ in 0..200_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let alphabet = b"{}[]\"'\\ \n:,1a\0\xff";
            if let Some(Piece::TooMuch(_)) = cutter.push(alphabet[(state >> 16) as usize % alphabet.len()]) {
                cutter = Cutter::default();
            }
            assert!(cutter.text.len() <= MOST_BYTES + 2);
        }
    }
}
