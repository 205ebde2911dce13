//! Makes include/drive_backup.h from `capi.rs` and the layout, and compares. To write it anew:
//! `DRIVE_BACKUP_WRITE_HEADER=1 cargo test --features capi header`.

use crate::ring::{layout, packet};
use std::fmt::Write;

const SOURCE: &str = include_str!("../capi.rs");
const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/include/drive_backup.h");

const TOP: &str = "\
/*
 * drive-backup: let backups attach to a program that writes a disk.
 *
 * Every change to the disk (write, discard, write-zeroes) stands between drive_backup_writer_begin and
 * drive_backup_writer_end. All functions may be called from any thread. Link with -ldrive_backup, built by
 *   cargo rustc --release --lib --crate-type cdylib --no-default-features --features capi
 *
 * Made from src/writer/capi.rs and src/ring/layout.rs; a test compares them. SPDX: MIT OR Apache-2.0
 */
#ifndef DRIVE_BACKUP_H
#define DRIVE_BACKUP_H

#include <stdint.h>

#ifdef __cplusplus
extern \"C\" {
#endif

typedef struct drive_backup_writer drive_backup_writer;

";

const BOTTOM: &str = "
#ifdef __cplusplus
}
#endif

#endif
";

/// A Rust type of `capi.rs`, with the name that it declares.
fn c_declaration(name: &str, rust: &str) -> String {
    match rust {
        "c_int" => format!("int {name}"),
        "u64" => format!("uint64_t {name}"),
        "*const c_char" => format!("const char *{name}"),
        "*mut c_void" => format!("void *{name}"),
        "*mut drive_backup_writer" => format!("drive_backup_writer *{name}"),
        "*mut *mut drive_backup_writer" => format!("drive_backup_writer **{name}"),
        "Option<unsafe extern \"C\" fn(*mut c_void) -> c_int>" => format!("int (*{name})(void *)"),
        other => panic!("no C type for {other}"),
    }
}

/// `fn name(a: A, b: B) -> C` as a C prototype.
fn prototype(signature: &str) -> String {
    let (name, rest) = signature.split_once('(').unwrap();
    let (arguments, result) = match rest.rsplit_once(") -> ") {
        // The last arrow may be that of a function pointer among the arguments.
        Some((arguments, result)) if !result.contains('>') => (arguments, result),
        _ => (rest.strip_suffix(')').unwrap(), ""),
    };
    let arguments: Vec<_> = arguments
        .split(", ")
        .filter_map(|argument| argument.trim_end_matches(',').split_once(": "))
        .map(|(name, rust)| c_declaration(name, rust))
        .collect();
    let result = if result.is_empty() { "void".to_owned() } else { c_declaration("", result).trim().to_owned() };
    format!("{result} {name}({});", arguments.join(", "))
}

fn functions() -> String {
    let mut text = String::new();
    let mut comment = Vec::new();
    let mut lines = SOURCE.lines();
    while let Some(line) = lines.next() {
        if let Some(words) = line.strip_prefix("/// ").or_else(|| line.strip_prefix("///")) {
            comment.push(words.replace('`', ""));
        } else if let Some(begin) = line.strip_prefix("pub unsafe extern \"C\" fn ") {
            let mut signature = begin.to_owned();
            while !signature.ends_with('{') {
                signature += " ";
                signature += lines.next().unwrap().trim();
            }
            let signature = signature.trim_end_matches('{').trim().replace("( ", "(").replace(", )", ")");
            writeln!(text, "\n/*").unwrap();
            for words in &comment {
                writeln!(text, " * {words}").unwrap();
            }
            writeln!(text, " */\n{}", prototype(&signature)).unwrap();
        } else if !line.starts_with("#[") {
            comment.clear();
        }
    }
    text.replace(" * # Safety\n", " * Promise:\n").replace(" * \n", " *\n")
}

fn render() -> String {
    let mut text = TOP.to_owned();
    writeln!(text, "/* Version of the protocol that this library speaks, see docs/RING.md. */").unwrap();
    writeln!(text, "#define DRIVE_BACKUP_PROTOCOL {}", layout::VERSION).unwrap();
    writeln!(text, "/* Bytes of a packet and of the ring, and its slots: writes that may wait at once. */").unwrap();
    writeln!(text, "#define DRIVE_BACKUP_PACKET_BYTES {}", packet::PACKET).unwrap();
    writeln!(text, "#define DRIVE_BACKUP_RING_BYTES {}", layout::at::END).unwrap();
    writeln!(text, "#define DRIVE_BACKUP_RING_SLOTS {}", layout::SLOTS).unwrap();
    text + &functions() + BOTTOM
}

#[test]
fn the_header_says_what_the_source_says() {
    let rendered = render();
    if std::env::var_os("DRIVE_BACKUP_WRITE_HEADER").is_some() {
        std::fs::write(PATH, &rendered).unwrap();
    }
    let written = std::fs::read_to_string(PATH).unwrap();
    assert_eq!(written, rendered, "write it anew, see the top of this file");
}

#[test]
fn the_names_are_the_fixed_ones() {
    let header = render();
    for fixed in [
        "int drive_backup_writer_open(drive_backup_writer **out, const char *device, const char *socket_dir);",
        "int drive_backup_writer_begin(drive_backup_writer *writer, uint64_t offset, uint64_t length);",
        "void drive_backup_writer_end(drive_backup_writer *writer, uint64_t offset, uint64_t length);",
        "void drive_backup_writer_on_freeze(drive_backup_writer *writer, int (*quiesce)(void *), void *argument);",
        "void drive_backup_writer_close(drive_backup_writer *writer);",
    ] {
        assert!(header.contains(fixed), "{fixed}\n{header}");
    }
}
