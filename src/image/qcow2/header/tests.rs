use super::*;

fn header() -> Header {
    Header {
        version: 3,
        cluster_bits: 16,
        size: (1 << 30) + 512,
        l1_size: 5,
        l1_table_offset: 0x30000,
        refcount_table_offset: 0x10000,
        refcount_table_clusters: 1,
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible_features: 0,
        compatible_features: compatible::LAZY_REFCOUNTS,
        autoclear_features: 0,
        refcount_order: 4,
        compression: Compression::Zlib,
        backing: None,
        data_file: None,
        bitmaps: false,
    }
}

fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = header().encode().expect("fits");
    change(&mut bytes);
    Header::parse(&bytes).expect_err("refused").to_string()
}

#[test]
fn what_is_encoded_is_decoded() {
    let plain = header();
    let v2 = Header { version: 2, compatible_features: 0, ..header() };
    let full = Header {
        incompatible_features: incompatible::COMPRESSION | incompatible::DATA_FILE | incompatible::EXTENDED_L2,
        compression: Compression::Zstd,
        backing: Some(Backing { name: "base.img".into(), format: Some("raw".into()) }),
        data_file: Some("data.raw".into()),
        ..header()
    };
    for header in [plain, v2, full] {
        assert_eq!(Header::parse(&header.encode().expect("fits")).expect("parses"), header);
    }
}

#[test]
fn unknown_incompatible_features_are_refused_by_name() {
    let text = refusal(|bytes| bytes[72..80].copy_from_slice(&(1u64 << 40 | 1 << 5).to_be_bytes()));
    assert_eq!(text, "unsupported incompatible qcow2 feature: bit 5, bit 40");

    let text = refusal(|bytes| {
        bytes[72..80].copy_from_slice(&(1u64 << 40).to_be_bytes());
        bytes.truncate(V3_LENGTH_WITH_COMPRESSION);
        let mut entry = [0; FEATURE_NAME_LENGTH];
        entry[1] = 40;
        entry[2..12].copy_from_slice(b"time\x1btrave");
        push_extension(bytes, extension::FEATURE_NAMES, &entry);
    });
    assert_eq!(text, "unsupported incompatible qcow2 feature: 'timetrave' (bit 40)");
}

#[test]
fn encryption_is_refused_by_name() {
    assert!(refusal(|bytes| bytes[35] = 1).contains("AES (crypt_method 1)"));
    assert!(refusal(|bytes| bytes[35] = 2).contains("LUKS (crypt_method 2)"));
    assert!(refusal(|bytes| bytes[32] = 9).contains("crypt_method is 150994944"));
}

#[test]
fn fields_out_of_range_are_refused_by_name() {
    let cases: [(usize, &[u8], &str); 15] = [
        (0, b"x", "magic"),
        (7, &[1], "qcow version 1 is not supported"),
        (23, &[8], "cluster_bits is 8"),
        (23, &[22], "cluster_bits is 22"),
        (24, &[0x80], "needs 17179869187"),
        (36, &[0x80], "more than 32 MiB"),
        (46, &[1], "L1 table's offset 0x30100"),
        (40, &[0x80], "past every file's end"),
        (55, &[1], "refcount table's offset 0x10001"),
        (56, &[1], "the refcount table has 16777217 clusters"),
        (60, &[1], "nb_snapshots is 16777216"),
        (99, &[7], "refcount_order is 7"),
        (103, &[113], "header_length is 113"),
        (100, &[1], "header_length is 16777328"),
        (104, &[1], "compression_type is 1"),
    ];
    for (at, value, expected) in cases {
        let text = refusal(|bytes| bytes[at..at + value.len()].copy_from_slice(value));
        assert!(text.contains(expected), "byte {at}: {text}");
    }
    assert!(refusal(|bytes| bytes[40..48].fill(0)).contains("L1 table's offset is 0"));
    assert!(refusal(|bytes| bytes[59] = 0).contains("the refcount table has 0 clusters"));
    assert!(refusal(|bytes| bytes[95] = 2).contains("no external data file"));
    assert!(refusal(|bytes| (bytes[23], bytes[79], bytes[36]) = (12, 16, 0)).contains("need 14"));
}

#[test]
fn a_truncated_header_is_refused_at_every_length() {
    let bytes = Header { backing: Some(Backing { name: "b".into(), format: None }), ..header() };
    let bytes = bytes.encode().expect("fits");
    for length in 0..bytes.len() {
        // What is cut off the extensions is either the end marker, without loss, or the backing file's name.
        assert!(Header::parse(&bytes[..length]).is_err(), "{length} bytes");
    }
}

#[test]
fn extensions_that_do_not_fit_are_refused() {
    let full = Header { data_file: Some("data.raw".into()), ..header() }.encode().expect("fits");
    for length in [9, u32::MAX - 7, u32::MAX] {
        let mut bytes = full.clone();
        bytes.truncate(128);
        bytes[116..120].copy_from_slice(&length.to_be_bytes());
        let text = Header::parse(&bytes).expect_err("refused").to_string();
        assert!(text.contains("header extension 0x44415441 at 0x70"), "{text}");
    }
}

#[test]
fn a_backing_name_out_of_range_is_refused() {
    let set = |offset: u64, length: u32| {
        refusal(|bytes| {
            bytes[8..16].copy_from_slice(&offset.to_be_bytes());
            bytes[16..20].copy_from_slice(&length.to_be_bytes());
        })
    };
    assert!(set(112, 0).contains("backing_file_size is 0"));
    assert!(set(112, 1024).contains("backing_file_size is 1024"));
    assert!(set(u64::MAX, 8).contains("not within the first cluster"));
    assert!(set(112, 1000).contains("not within the first cluster"));
    assert!(set(112, 8).contains("zero byte"));
}
