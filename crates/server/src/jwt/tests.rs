//! Every algorithm with keys made for the test, and what must not pass.

use std::path::PathBuf;

use super::*;

/// Seconds since 1970 at which all of this happens.
const NOW: u64 = 2_000_000_000;

/// Keys as files.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path: PathBuf = self.0.path().join(name);
        std::fs::write(&path, content).expect("written");
        path.display().to_string()
    }
}

/// An RSA key of 2048 bits; no library here makes one.
const RSA_PRIVATE: &str = include_str!("../../tests/keys/rsa_private.pem");
const RSA_PRIVATE_OLD_FORM: &str = include_str!("../../tests/keys/rsa_private_pkcs1.pem");
const RSA_PUBLIC: &str = include_str!("../../tests/keys/rsa_public.pem");
/// Keys on P-256 in the old form, as `openssl ecparam -genkey` writes them.
const EC_PRIVATE_OLD_FORM: &str = include_str!("../../tests/keys/ec_private_sec1.pem");

fn generated(algorithm: &'static rcgen::SignatureAlgorithm) -> (String, String) {
    let pair = rcgen::KeyPair::generate_for(algorithm).expect("a key");
    (pair.serialize_pem(), pair.public_key_pem())
}

fn jwt(options: &[(&str, &str)]) -> Jwt {
    Jwt::new(options).expect("usable")
}

/// Signs by one, checks by the other.
fn passes(signer: &Jwt, checker: &Jwt) {
    let token = signer.sign("ann", 7, NOW).expect("signed");
    let asker = checker.verify(&token, NOW).expect("right");
    assert_eq!((asker.user.as_str(), asker.auth_revision), ("ann", 7));
}

#[test]
fn all_algorithms_sign_and_check() {
    let files = Files::new();
    let secret = files.file("secret", "not so secret");
    let keys = [
        (
            &["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"][..],
            (RSA_PRIVATE.to_owned(), RSA_PUBLIC.to_owned()),
        ),
        (&["ES256"][..], generated(&rcgen::PKCS_ECDSA_P256_SHA256)),
        (&["ES384"][..], generated(&rcgen::PKCS_ECDSA_P384_SHA384)),
        (&["EdDSA"][..], generated(&rcgen::PKCS_ED25519)),
    ];
    for method in ["HS256", "HS384", "HS512"] {
        let both = jwt(&[("sign-method", method), ("priv-key", &secret)]);
        passes(&both, &both);
    }
    for (methods, (private, public)) in keys {
        let (private, public) = (files.file("private", private), files.file("public", public));
        for method in methods {
            let method = ("sign-method", *method);
            let signs = jwt(&[method, ("priv-key", &private)]);
            let both = jwt(&[method, ("priv-key", &private), ("pub-key", &public)]);
            let checks = jwt(&[method, ("pub-key", &public)]);
            passes(&signs, &checks);
            passes(&both, &signs);
            assert_eq!(checks.sign("ann", 7, NOW), Err(Error::VerifyOnlyKey));
        }
    }
}

#[test]
fn older_forms_of_keys_are_read() {
    let files = Files::new();
    let rsa = files.file("rsa", RSA_PRIVATE_OLD_FORM);
    let public = files.file("public", RSA_PUBLIC);
    let rsa = jwt(&[("sign-method", "RS256"), ("priv-key", &rsa), ("pub-key", &public)]);
    passes(&rsa, &rsa);
    let ec = files.file("ec", EC_PRIVATE_OLD_FORM);
    let ec = jwt(&[("sign-method", "ES256"), ("priv-key", &ec)]);
    passes(&ec, &ec);
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("a key");
    let params = rcgen::CertificateParams::new(vec!["x".to_owned()]).expect("names");
    let certificate = params.self_signed(&pair).expect("a certificate").pem();
    let (private, public) = (pair.serialize_pem(), files.file("cert", certificate));
    let private = files.file("ed", private);
    passes(
        &jwt(&[("sign-method", "EdDSA"), ("priv-key", &private)]),
        &jwt(&[("sign-method", "EdDSA"), ("pub-key", &public)]),
    );
}

#[test]
fn what_is_not_right_does_not_pass() {
    let files = Files::new();
    let (private, public) = generated(&rcgen::PKCS_ED25519);
    let (other, _) = generated(&rcgen::PKCS_ED25519);
    let (private, other) = (files.file("private", private), files.file("other", other));
    let public_file = files.file("public", &public);
    let jwt_of = |method, path: &str| jwt(&[("sign-method", method), ("priv-key", path)]);
    let ours = jwt(&[("sign-method", "EdDSA"), ("priv-key", &private), ("ttl", "10m")]);
    let token = ours.sign("ann", 7, NOW).expect("signed");
    assert!(ours.verify(&token, NOW + 599).is_ok());
    assert_eq!(ours.verify(&token, NOW + 600), Err(Error::InvalidAuthToken), "expired");
    assert!(jwt_of("EdDSA", &other).verify(&token, NOW).is_err(), "another key");
    // The public key as a secret of HMAC: the oldest trick with such tokens.
    let forged = jwt_of("HS256", &public_file).sign("root", 7, NOW).expect("signed");
    assert!(ours.verify(&forged, NOW).is_err());
    for at in 0..token.len() {
        let mut bytes = token.clone().into_bytes();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(bytes).expect("ASCII");
        let asker = ours.verify(&changed, NOW);
        assert!(asker.is_err(), "letter {at} of {token}");
    }
    for cut in ["", ".", "..", "a.b", "a.b.c.d", &token[..token.len() - 1], "token.1"] {
        assert!(ours.verify(cut, NOW).is_err(), "{cut}");
    }
}

/// A token with claims of one's own.
fn with_claims(jwt: &Jwt, head: &Value, claims: &Value) -> String {
    let part = |json: &Value| URL_SAFE_NO_PAD.encode(json.to_string());
    let signed = format!("{}.{}", part(head), part(claims));
    let signature = jwt.signer.as_ref().expect("a signer").sign(signed.as_bytes()).expect("signed");
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[test]
fn claims_of_others_count_as_in_etcd() {
    let files = Files::new();
    let secret = files.file("secret", "s");
    let jwt = jwt(&[("sign-method", "HS256"), ("priv-key", &secret)]);
    let head = json!({ "alg": "HS256" });
    let asker = |claims: Value| jwt.verify(&with_claims(&jwt, &head, &claims), NOW);
    let plain = asker(json!({ "username": "ann", "revision": 3 })).expect("no end is no limit");
    assert_eq!((plain.user.as_str(), plain.auth_revision), ("ann", 3));
    assert!(asker(json!({ "username": "ann", "revision": 3.7, "exp": NOW as f64 + 0.5 })).is_ok());
    for wrong in [
        json!({ "username": "ann" }),
        json!({ "revision": 3 }),
        json!({ "username": 7, "revision": 3 }),
        json!({ "username": "ann", "revision": "3" }),
        json!({ "username": "ann", "revision": 3, "exp": NOW }),
        json!({ "username": "ann", "revision": 3, "exp": "never" }),
        json!({ "username": "ann", "revision": 3, "nbf": NOW + 1 }),
        json!([]),
    ] {
        assert!(asker(wrong.clone()).is_err(), "{wrong}");
    }
    let claims = json!({ "username": "ann", "revision": 3 });
    for head in [json!({}), json!({ "alg": "none" }), json!({ "alg": "HS512" }), json!(1)] {
        assert!(jwt.verify(&with_claims(&jwt, &head, &claims), NOW).is_err(), "{head}");
    }
}

#[test]
fn unusable_settings_say_what_is_wrong() {
    let files = Files::new();
    let (ec, ec_public) = generated(&rcgen::PKCS_ECDSA_P256_SHA256);
    let (_, foreign) = generated(&rcgen::PKCS_ECDSA_P256_SHA256);
    let (wide, wide_public) = generated(&rcgen::PKCS_ECDSA_P384_SHA384);
    let file = |name: &str, content: &str| files.file(name, content);
    let (ec, ec_public) = (file("ec", &ec), file("ec_public", &ec_public));
    let (foreign, empty) = (file("foreign", &foreign), file("empty", ""));
    let (wide, wide_public) = (file("wide", &wide), file("wide_public", &wide_public));
    let refused = |options: &[(&str, &str)]| Jwt::new(options).expect_err("unusable");
    for (options, reason) in [
        (vec![("priv-key", ec.as_str())], "sign-method is missing"),
        (vec![("sign-method", "ES512"), ("priv-key", &ec)], "use one of HS256, "),
        (vec![("sign-method", "ES256")], "ES256 needs priv-key, pub-key or both"),
        (vec![("sign-method", "HS256"), ("priv-key", &empty)], "a file with the secret"),
        (vec![("sign-method", "ES256"), ("priv-key", "/nowhere")], "cannot read priv-key /nowhere"),
        (vec![("sign-method", "RS256"), ("priv-key", &ec)], "priv-key holds no key for RS256"),
        (vec![("sign-method", "RS256"), ("pub-key", &ec_public)], "it is a key of another kind"),
        (vec![("sign-method", "ES256"), ("priv-key", &wide)], "priv-key holds no key for ES256"),
        (vec![("sign-method", "ES256"), ("pub-key", &wide_public)], "it is a key of another kind"),
        (vec![("sign-method", "ES256"), ("pub-key", &empty)], "PUBLIC KEY or CERTIFICATE"),
        (
            vec![("sign-method", "ES256"), ("priv-key", &ec), ("pub-key", &foreign)],
            "do not belong together",
        ),
        (vec![("sign-method", "ES256"), ("priv-key", &ec), ("ttl", "soon")], "ttl \"soon\""),
    ] {
        let said = refused(&options);
        assert!(said.contains(reason), "{said}");
    }
    assert!(
        Jwt::new(&[("sign-method", "ES256"), ("priv-key", &ec), ("pub-key", &ec_public)]).is_ok()
    );
}
