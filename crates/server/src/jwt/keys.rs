//! Keys of signed tokens: which algorithms there are, what a key file may hold, and the two things
//! done with keys. The mathematics is ring's.

use ring::signature::{
    self, EcdsaKeyPair, EcdsaSigningAlgorithm, Ed25519KeyPair, KeyPair, RsaEncoding, RsaKeyPair,
    UnparsedPublicKey, VerificationAlgorithm,
};
use ring::{hmac, rand::SystemRandom};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, SubjectPublicKeyInfoDer};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::SubjectPublicKeyInfo;

/// How a family of algorithms works.
#[derive(Clone, Copy)]
enum Family {
    Hmac(hmac::Algorithm),
    Rsa(&'static dyn RsaEncoding),
    /// With the identifier of the curve, and the bytes of a point on it.
    Ecdsa(&'static EcdsaSigningAlgorithm, &'static [u8], usize),
    Ed25519,
}

/// One way to sign, by its name in RFC 7518.
#[derive(Clone, Copy)]
pub(super) struct Algorithm {
    name: &'static str,
    family: Family,
    /// Not used by HMAC.
    verification: &'static dyn VerificationAlgorithm,
}

/// Object identifiers as they stand in DER.
const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
const EC: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
const ED25519: &[u8] = &[0x2b, 0x65, 0x70];
const P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const P384: &[u8] = &[0x2b, 0x81, 0x04, 0x00, 0x22];

impl Algorithm {
    pub(super) fn name(self) -> &'static str {
        self.name
    }

    pub(super) fn by_name(name: &str) -> Result<Self, String> {
        let all = all();
        all.into_iter().find(|algorithm| algorithm.name == name).ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|algorithm| algorithm.name).collect();
            format!("unknown sign-method \"{name}\": use one of {}", names.join(", "))
        })
    }

    /// The identifier of its kind of keys.
    fn key_oid(self) -> &'static [u8] {
        match self.family {
            Family::Rsa(_) | Family::Hmac(_) => RSA,
            Family::Ecdsa(..) => EC,
            Family::Ed25519 => ED25519,
        }
    }
}

/// ES512 is missing: the library has no such curve.
fn all() -> [Algorithm; 12] {
    use signature as s;
    let row = |name, family, verification| Algorithm { name, family, verification };
    let hmac = |name, algorithm| row(name, Family::Hmac(algorithm), &s::ED25519);
    [
        hmac("HS256", hmac::HMAC_SHA256),
        hmac("HS384", hmac::HMAC_SHA384),
        hmac("HS512", hmac::HMAC_SHA512),
        row("RS256", Family::Rsa(&s::RSA_PKCS1_SHA256), &s::RSA_PKCS1_2048_8192_SHA256),
        row("RS384", Family::Rsa(&s::RSA_PKCS1_SHA384), &s::RSA_PKCS1_2048_8192_SHA384),
        row("RS512", Family::Rsa(&s::RSA_PKCS1_SHA512), &s::RSA_PKCS1_2048_8192_SHA512),
        row("PS256", Family::Rsa(&s::RSA_PSS_SHA256), &s::RSA_PSS_2048_8192_SHA256),
        row("PS384", Family::Rsa(&s::RSA_PSS_SHA384), &s::RSA_PSS_2048_8192_SHA384),
        row("PS512", Family::Rsa(&s::RSA_PSS_SHA512), &s::RSA_PSS_2048_8192_SHA512),
        row(
            "ES256",
            Family::Ecdsa(&s::ECDSA_P256_SHA256_FIXED_SIGNING, P256, 65),
            &s::ECDSA_P256_SHA256_FIXED,
        ),
        row(
            "ES384",
            Family::Ecdsa(&s::ECDSA_P384_SHA384_FIXED_SIGNING, P384, 97),
            &s::ECDSA_P384_SHA384_FIXED,
        ),
        row("EdDSA", Family::Ed25519, &s::ED25519),
    ]
}

/// Makes signatures.
pub(super) enum Signer {
    Hmac(hmac::Key),
    Rsa(Box<RsaKeyPair>, &'static dyn RsaEncoding),
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl Signer {
    pub(super) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, ()> {
        let random = SystemRandom::new();
        match self {
            Self::Hmac(key) => Ok(hmac::sign(key, message).as_ref().to_vec()),
            Self::Rsa(pair, encoding) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                let signed = pair.sign(*encoding, &random, message, &mut signature);
                signed.map(|()| signature).map_err(drop)
            }
            Self::Ecdsa(pair) => {
                pair.sign(&random, message).map(|it| it.as_ref().to_vec()).map_err(drop)
            }
            Self::Ed25519(pair) => Ok(pair.sign(message).as_ref().to_vec()),
        }
    }

    /// What checks its signatures.
    fn verifier(&self, algorithm: Algorithm) -> Verifier {
        let public: Vec<u8> = match self {
            Self::Hmac(key) => return Verifier::Hmac(key.clone()),
            Self::Rsa(pair, _) => pair.public().as_ref().to_vec(),
            Self::Ecdsa(pair) => pair.public_key().as_ref().to_vec(),
            Self::Ed25519(pair) => pair.public_key().as_ref().to_vec(),
        };
        Verifier::Public(UnparsedPublicKey::new(algorithm.verification, public))
    }
}

/// Checks signatures.
pub(super) enum Verifier {
    Hmac(hmac::Key),
    Public(UnparsedPublicKey<Vec<u8>>),
}

impl Verifier {
    pub(super) fn verify(&self, message: &[u8], signature: &[u8]) -> Option<()> {
        match self {
            Self::Hmac(key) => hmac::verify(key, message, signature).ok(),
            Self::Public(key) => key.verify(message, signature).ok(),
        }
    }
}

/// Keys from the contents of their files. HMAC has one secret, the private file as it is.
pub(super) fn load(
    algorithm: Algorithm,
    private: Option<&[u8]>,
    public: Option<&[u8]>,
) -> Result<(Verifier, Option<Signer>), String> {
    let name = algorithm.name;
    if let Family::Hmac(kind) = algorithm.family {
        let secret = private.filter(|secret| !secret.is_empty());
        let secret = secret.ok_or(format!("{name} needs priv-key, a file with the secret"))?;
        let signer = Signer::Hmac(hmac::Key::new(kind, secret));
        return Ok((signer.verifier(algorithm), Some(signer)));
    }
    let signer = private.map(|pem| private_key(algorithm, pem)).transpose();
    let signer = signer.map_err(|reason| format!("priv-key holds no key for {name}: {reason}"))?;
    let public = public.map(|pem| public_key(algorithm, pem)).transpose();
    let public = public.map_err(|reason| format!("pub-key holds no key for {name}: {reason}"))?;
    match (signer, public) {
        (None, None) => Err(format!("{name} needs priv-key, pub-key or both")),
        (None, Some(public)) => {
            let key = UnparsedPublicKey::new(algorithm.verification, public);
            Ok((Verifier::Public(key), None))
        }
        (Some(signer), public) => {
            let verifier = signer.verifier(algorithm);
            let own = match &verifier {
                Verifier::Public(key) => Some(key.as_ref()),
                Verifier::Hmac(_) => None,
            };
            if public.is_some() && public.as_deref() != own {
                return Err("priv-key and pub-key do not belong together".to_owned());
            }
            Ok((verifier, Some(signer)))
        }
    }
}

fn private_key(algorithm: Algorithm, pem: &[u8]) -> Result<Signer, String> {
    let der = PrivateKeyDer::from_pem_slice(pem).map_err(|error| error.to_string())?;
    let other_kind = || "it is a key of another kind".to_owned();
    match (algorithm.family, &der) {
        (Family::Rsa(encoding), PrivateKeyDer::Pkcs1(der)) => {
            let pair = RsaKeyPair::from_der(der.secret_pkcs1_der());
            pair.map(|pair| Signer::Rsa(Box::new(pair), encoding)).map_err(|it| it.to_string())
        }
        (Family::Rsa(encoding), PrivateKeyDer::Pkcs8(der)) => {
            let pair = RsaKeyPair::from_pkcs8(der.secret_pkcs8_der());
            pair.map(|pair| Signer::Rsa(Box::new(pair), encoding)).map_err(|it| it.to_string())
        }
        (Family::Ecdsa(kind, curve, _), PrivateKeyDer::Sec1(der)) => {
            ecdsa(kind, &wrap_sec1(curve, der.secret_sec1_der()))
        }
        (Family::Ecdsa(kind, ..), PrivateKeyDer::Pkcs8(der)) => ecdsa(kind, der.secret_pkcs8_der()),
        (Family::Ed25519, PrivateKeyDer::Pkcs8(der)) => {
            let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der());
            pair.map(Signer::Ed25519).map_err(|error| error.to_string())
        }
        _ => Err(other_kind()),
    }
}

fn ecdsa(kind: &'static EcdsaSigningAlgorithm, pkcs8: &[u8]) -> Result<Signer, String> {
    let pair = EcdsaKeyPair::from_pkcs8(kind, pkcs8, &SystemRandom::new());
    pair.map(Signer::Ecdsa).map_err(|error| error.to_string())
}

/// Puts the older form of a private key on a curve into the newer one (RFC 5208).
fn wrap_sec1(curve: &[u8], key: &[u8]) -> Vec<u8> {
    let algorithm = der(0x30, &[der(0x06, &[EC.to_vec()]), der(0x06, &[curve.to_vec()])]);
    der(0x30, &[vec![0x02, 1, 0], algorithm, der(0x04, &[key.to_vec()])])
}

/// One value in DER: tag, length, content.
fn der(tag: u8, parts: &[Vec<u8>]) -> Vec<u8> {
    let content = parts.concat();
    let bytes = content.len().to_be_bytes();
    let significant = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
    let length = match content.len() {
        short @ 0..0x80 => vec![short as u8],
        _ => [&[0x80 | significant.len() as u8], significant].concat(),
    };
    [vec![tag], length, content].concat()
}

/// The bare key from a PEM file with a public key or a certificate.
fn public_key(algorithm: Algorithm, pem: &[u8]) -> Result<Vec<u8>, String> {
    if let Ok(der) = SubjectPublicKeyInfoDer::from_pem_slice(pem) {
        let (_, info) = SubjectPublicKeyInfo::from_der(&der).map_err(|it| it.to_string())?;
        return bare(algorithm, &info);
    }
    let der = CertificateDer::from_pem_slice(pem)
        .map_err(|_| "a PEM section PUBLIC KEY or CERTIFICATE is needed".to_owned())?;
    let (_, certificate) = X509Certificate::from_der(&der).map_err(|it| it.to_string())?;
    bare(algorithm, certificate.public_key())
}

fn bare(algorithm: Algorithm, info: &SubjectPublicKeyInfo<'_>) -> Result<Vec<u8>, String> {
    let key = info.subject_public_key.data.to_vec();
    let has_size = match algorithm.family {
        Family::Ecdsa(_, _, point) => key.len() == point,
        Family::Rsa(_) | Family::Ed25519 | Family::Hmac(_) => true,
    };
    let is_kind = info.algorithm.algorithm.as_bytes() == algorithm.key_oid();
    (is_kind && has_size).then_some(key).ok_or_else(|| "it is a key of another kind".to_owned())
}
