//! Golden bytes of every key and value on disk, and what the decoders do with damaged ones.

use kelson_api::authpb::{Permission, UserAddOptions};

use super::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn member() -> Member {
    Member {
        id: 0xabc,
        name: "m1".to_owned(),
        peer_ur_ls: vec!["http://p".to_owned()],
        client_ur_ls: vec!["http://c".to_owned()],
        is_learner: true,
    }
}

/// Name, hash `hh`, the roles `r` and `root`, options that say nothing: as etcd marshals it.
const USER_HEX: &str = "0a03616e6e120268681a01721a04726f6f742200";

/// Name, and one permission to write from `a` to `b`.
const ROLE_HEX: &str = "0a0172120808011201611a0162";

fn user() -> User {
    User {
        name: Bytes::from_static(b"ann"),
        password: Bytes::from_static(b"hh"),
        roles: vec!["r".to_owned(), "root".to_owned()],
        options: Some(UserAddOptions { no_password: false }),
    }
}

fn role() -> Role {
    let (key, range_end) = (Bytes::from_static(b"a"), Bytes::from_static(b"b"));
    let permission = Permission { perm_type: 1, key, range_end };
    Role { name: Bytes::from_static(b"r"), key_permission: vec![permission] }
}

fn row(tombstone: bool) -> Row {
    let kv = Bytes::from_static(b"\x0a\x01k\x10\x02\x18\x03\x20\x01\x2a\x01v");
    Row { key: RevisionKey { main: 0x0102, sub: 3 }, tombstone, kv }
}

/// Key and payload in hexadecimal.
type HexPair = (&'static str, &'static str);

/// One change of each kind with the pairs that it puts and the keys that it removes.
fn changes() -> Vec<(MetaChange, Vec<HexPair>, Vec<&'static str>)> {
    let alarm = AlarmMember { member_id: 7, alarm: 1 };
    vec![
        (
            MetaChange::LeasePut(LeaseRow { id: 77, ttl: 300, remaining_ttl: 12 }),
            vec![("6c000000000000004d", "084d10ac02180c")],
            vec![],
        ),
        (MetaChange::LeaseRemove(-1), vec![], vec!["6cffffffffffffffff"]),
        (MetaChange::AlarmPut(alarm), vec![("7808071001", "")], vec![]),
        (MetaChange::AlarmRemove(alarm), vec![], vec!["7808071001"]),
        (
            MetaChange::MemberPut(member()),
            vec![(
                "700000000000000abc",
                "08bc1512026d311a08687474703a2f2f702208687474703a2f2f632801",
            )],
            vec![],
        ),
        (
            MetaChange::MemberRemove(0xabc),
            vec![("720000000000000abc", "")],
            vec!["700000000000000abc", "750000000000000abc"],
        ),
        (
            MetaChange::MemberUuid(1, Bytes::from_static(b"uuid")),
            vec![("750000000000000001", "75756964")],
            vec![],
        ),
        (
            MetaChange::Membership(LogId { term: 1, index: 2 }, Bytes::from_static(b"m")),
            vec![("6d6d656d62657273686970", "000000000000000100000000000000026d")],
            vec![],
        ),
        (
            MetaChange::ClusterVersion("3.7.0".to_owned()),
            vec![("6d636c75737465725f76657273696f6e", "332e372e30")],
            vec![],
        ),
        (
            MetaChange::ScheduledCompaction(5),
            vec![("6d636f6d706163745f7363686564756c6564", "0000000000000005")],
            vec![],
        ),
        (
            MetaChange::FinishedCompaction(4),
            vec![("6d636f6d706163745f66696e6973686564", "0000000000000004")],
            vec![],
        ),
        (MetaChange::AuthEnabled(true), vec![("6d617574685f656e61626c6564", "01")], vec![]),
        (
            MetaChange::AuthRevision(9),
            vec![("6d617574685f7265766973696f6e", "0000000000000009")],
            vec![],
        ),
        (MetaChange::UserPut(user()), vec![("6e616e6e", USER_HEX)], vec![]),
        (MetaChange::UserRemove("ann".to_owned()), vec![], vec!["6e616e6e"]),
        (MetaChange::RolePut(role()), vec![("6f72", ROLE_HEX)], vec![]),
        (MetaChange::RoleRemove("r".to_owned()), vec![], vec!["6f72"]),
    ]
}

#[test]
fn meta_changes_have_these_bytes() {
    for (change, puts, removes) in changes() {
        let writes = encode_meta(&change);
        let found: Vec<_> = writes.puts.iter().map(|(key, value)| (hex(key), hex(value))).collect();
        let wanted: Vec<_> = puts
            .iter()
            .map(|(key, payload)| {
                let sum = checksum(&unhex(key), &unhex(payload));
                ((*key).to_owned(), format!("{payload}{}", hex(&sum.to_le_bytes())))
            })
            .collect();
        assert_eq!(found, wanted, "{change:?}");
        let removed: Vec<_> = writes.removes.iter().map(|key| hex(key)).collect();
        assert_eq!(removed, removes, "{change:?}");
    }
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal");
    (0..text.len()).step_by(2).map(digit).collect()
}

#[test]
fn rows_have_these_bytes() {
    let (key, value) = encode_row(&row(false));
    assert_eq!(hex(&key), "6b00000000000001025f0000000000000003");
    // The checksum itself is golden: it must not change with the library.
    assert_eq!(hex(&value), "0a016b1002180320012a01760a61c1a3");
    let (key, _) = encode_row(&row(true));
    assert_eq!(hex(&key), "6b00000000000001025f000000000000000374");
    for row in [row(false), row(true)] {
        let (key, value) = encode_row(&row);
        assert_eq!(decode_row(&key, Bytes::from(value)), Ok(row));
    }
}

const CHAIN_AT_9: Chain = Chain { hash: 0x0a0b_0c0d_0e0f_1011, since: 4 };

#[test]
fn a_checkpoint_has_these_bytes() {
    let mut tally = Tally::default();
    let (key, value) = encode_row(&row(false));
    tally.add(&key, &value);
    let pairs = encode_checkpoint(LogId { term: 3, index: 9 }, CHAIN_AT_9, tally);
    let text: Vec<_> = pairs
        .iter()
        .map(|(key, value)| (hex(key), hex(&value[..value.len() - SEAL_LEN])))
        .collect();
    assert_eq!(
        text,
        [
            ("6d6170706c696564".into(), "00000000000000030000000000000009".into()),
            ("6d636861696e".into(), "0a0b0c0d0e0f10110000000000000004".into()),
            ("6d736368656d61".into(), "00000003".into()),
            ("6d74616c6c79".into(), format!("0000000000000001{:016x}", tally.sum)),
        ] as [(String, String); 4]
    );
}

#[test]
fn the_origin_of_a_state_has_these_bytes() {
    let (key, value) = encode_installed(LogId { term: 3, index: 9 });
    assert_eq!(hex(&key), "6d696e7374616c6c6564");
    assert_eq!(hex(&value[..16]), "00000000000000030000000000000009");
    let mut tables = Tables::default();
    tables.take(&key, &value).expect("decodes");
    assert_eq!(tables.installed, LogId { term: 3, index: 9 });
    assert!(encode_tables(&tables).is_empty(), "it is not sent on");
}

#[test]
fn tables_read_back_what_changes_wrote() {
    let mut tables = Tables::default();
    for (change, ..) in changes() {
        for (key, value) in encode_meta(&change).puts {
            tables.take(&key, &value).expect("decodes");
        }
    }
    let closing = encode_checkpoint(LogId { term: 3, index: 9 }, CHAIN_AT_9, Tally::default());
    for (key, value) in closing {
        tables.take(&key, &value).expect("decodes");
    }
    assert_eq!(tables.applied, LogId { term: 3, index: 9 });
    assert_eq!(tables.leases, [LeaseRow { id: 77, ttl: 300, remaining_ttl: 12 }]);
    assert_eq!(tables.alarms, [AlarmMember { member_id: 7, alarm: 1 }]);
    assert_eq!(tables.members, [member()]);
    assert_eq!(tables.removed, [0xabc]);
    assert_eq!(tables.uuids, [(1, Bytes::from_static(b"uuid"))]);
    let membership = (LogId { term: 1, index: 2 }, Bytes::from_static(b"m"));
    assert_eq!(tables.membership, Some(membership));
    assert_eq!(tables.cluster_version.as_deref(), Some("3.7.0"));
    let auth = AuthRows {
        enabled: Some(true),
        revision: Some(9),
        users: vec![user()],
        roles: vec![role()],
    };
    assert_eq!(tables.auth, auth);
    assert_eq!((tables.scheduled_compaction, tables.finished_compaction), (Some(5), Some(4)));
    assert_eq!(tables.schema, Some(SCHEMA_VERSION));
    assert_eq!(tables.chain, Some(CHAIN_AT_9));
    let mut again = Tables::default();
    for (key, value) in encode_tables(&tables) {
        assert!(!is_own(&key));
        again.take(&key, &value).expect("decodes");
    }
    let without = Tables {
        applied: again.applied,
        schema: None,
        chain: None,
        tally: Tally::default(),
        ..tables
    };
    assert_eq!(format!("{again:?}"), format!("{without:?}"));
}

#[test]
fn every_flipped_bit_and_every_cut_is_refused() {
    let mut pairs = vec![encode_row(&row(false)), encode_row(&row(true))];
    pairs.extend(changes().iter().flat_map(|(change, ..)| encode_meta(change).puts));
    pairs.extend(encode_checkpoint(LogId { term: 1, index: 1 }, CHAIN_AT_9, Tally::default()));
    let accepts = |key: &[u8], value: &[u8]| {
        let value_bytes = Bytes::copy_from_slice(value);
        decode_row(key, value_bytes).is_ok() || Tables::default().take(key, value).is_ok()
    };
    for (key, value) in pairs {
        assert!(accepts(&key, &value));
        for bit in 0..(key.len() + value.len()) * 8 {
            let (mut key, mut value) = (key.clone(), value.clone());
            match bit / 8 {
                at if at < key.len() => key[at] ^= 1 << (bit % 8),
                at => value[at - key.len()] ^= 1 << (bit % 8),
            }
            assert!(!accepts(&key, &value), "bit {bit} of {key:02x?}");
        }
        for len in 0..value.len() {
            assert!(!accepts(&key, &value[..len]));
        }
    }
}

#[test]
fn a_revision_that_is_none_is_refused() {
    let good = revision_bytes(RevisionKey { main: 1, sub: 2 }, true);
    assert_eq!(parse_revision(&good), Some((RevisionKey { main: 1, sub: 2 }, true)));
    assert_eq!(parse_revision(&good[..16]), None);
    let with = |at: usize, byte: u8| {
        let mut bad = good.clone();
        bad[at] = byte;
        parse_revision(&bad)
    };
    assert_eq!(with(8, b'-'), None);
    assert_eq!(with(17, b'x'), None);
    assert_eq!(with(0, 0x80), None, "negative");
}

#[test]
fn the_tally_notices_what_checksums_cannot() {
    let rows: Vec<_> = (0..3)
        .map(|main| encode_row(&Row { key: RevisionKey { main, sub: 0 }, ..row(false) }))
        .collect();
    let tally = |which: &[usize]| {
        let mut tally = Tally::default();
        which.iter().for_each(|at| tally.add(&rows[*at].0, &rows[*at].1));
        tally
    };
    assert_eq!(tally(&[0, 1, 2]), tally(&[2, 0, 1]), "order does not matter");
    assert_ne!(tally(&[0, 1]), tally(&[0, 1, 2]));
    assert_ne!(tally(&[0, 1]), tally(&[0, 2]));
    assert_ne!(tally(&[0, 0]), tally(&[1, 1]));
    let mut after_removal = tally(&[0, 1, 2]);
    after_removal.subtract(&rows[1].0, &rows[1].1);
    assert_eq!(after_removal, tally(&[0, 2]));
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(data: Vec<u8>) {
        fuzz(&data);
    }

    #[test]
    fn near_misses_are_decoded_or_refused(table in 0_u8..10, mut rest: Vec<u8>, name_len in 0_u8..20) {
        let table = b"klmnopruxz"[table as usize];
        rest.splice(..0, [name_len.saturating_add(1), table]);
        fuzz(&rest);
    }
}
