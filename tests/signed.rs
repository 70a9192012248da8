//! Keys are made, and a guest that trusts one runs only what was signed with it (law S5).
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Place, until};

#[test]
fn s5_a_guest_that_trusts_a_key_runs_what_it_signed_and_nothing_else() {
    let place = Place::new();
    place.script("prepare", "echo ran >>runs; echo '{\"port\":3306}'");
    place.file("fleet.jsonl", r#"{"id":"vm-1","prepare":{}}"#);
    let made = place.run(["keys", "generate", "signing.key"]);
    made.expect(0, &[]);
    assert!(made.stdout.starts_with("wilco-public-ed25519:"), "{made:?}");
    let again = place.run(["keys", "public", "signing.key"]);
    assert_eq!(made.stdout, again.stdout);
    place.file("trusted.keys", &made.stdout);
    place
        .run(["keys", "generate", "signing.key"])
        .expect(4, &["not overwritten"]);

    let exec = ["--exec", "./prepare", "--trust", "trusted.keys"];
    let guest = place.start(["guest", "vm-1"].into_iter().chain(exec));
    let sign = ["--sign-key", "signing.key"];
    until("the guest answers", || {
        let ping = ["ping", "vm-1"].into_iter().chain(sign);
        place.run(ping).code == Some(0)
    });
    place
        .run(["ping", "vm-1"])
        .expect(1, &["not signed", "trusted key"]);
    let provision = ["provision", "fleet.jsonl"].into_iter().chain(sign);
    let provisioned = place.run(provision);
    provisioned.expect(0, &[]);
    assert!(provisioned.stdout.contains("succeeded"), "{provisioned:?}");
    assert_eq!(place.read("runs"), "ran\n");
    guest.stop().expect(0, &["attached", "stopped"]);
}

#[test]
fn s5_keys_in_the_wrong_place_are_told_without_a_word_of_them() {
    let place = Place::new();
    place.script("prepare", "true");
    place
        .run(["keys", "generate", "signing.key"])
        .expect(0, &[]);
    let secret = place.read("signing.key");
    let digits = secret.trim().rsplit(':').next().unwrap();
    let guest = ["guest", "vm-1", "--exec", "./prepare", "--trust"];
    for (args, code, words) in [
        ([&guest[..], &["signing.key"]].concat(), 2, "secret key"),
        ([&guest[..], &["missing"]].concat(), 10, "missing"),
        (vec!["ping", "vm-1", "--sign-key", "missing"], 10, "missing"),
    ] {
        let ended = place.run(args);
        ended.expect(code, &[words]);
        assert!(!ended.stderr.contains(digits), "{ended:?}");
    }
    place.script("open", "chmod 644 signing.key");
    std::process::Command::new(place.path().join("open"))
        .current_dir(place.path())
        .status()
        .unwrap();
    place
        .run(["ping", "vm-1", "--sign-key", "signing.key"])
        .expect(2, &["chmod 600"]);
}
