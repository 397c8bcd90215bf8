//! TLS as libpq does it, on rustls: which certificates are trusted for each `sslmode`, and what binds SCRAM to them.
//!
//! Three habits of libpq that rustls by itself does not have, because servers in the field depend on them: `verify-ca`
//! looks at no name; a self-signed certificate is trusted by being a root itself; a certificate without alternative
//! names is made out to its common name (`src/interfaces/libpq/fe-secure-openssl.c`, `fe-secure-common.c`).

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_cert::Certificate;
use x509_cert::der::oid::db::{rfc4519, rfc5280, rfc5912};
use x509_cert::der::{Decode, Encode};

use super::conninfo::{Roots, SslMode, TlsSettings};
use crate::error::{Error, ErrorKind, Result};

/// What `sslnegotiation=direct` requires and libpq 17 always sends.
const ALPN: &[u8] = b"postgresql";

/// What rustls needs to connect as `settings` say. Reads the files anew, so that renewed certificates count.
///
/// # Errors
/// [`ErrorKind::PostgresDenied`]: a certificate or key cannot be read, or `sslmode` wants roots and there are none.
pub(super) fn client_config(settings: &TlsSettings) -> Result<Arc<ClientConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Verifier {
        anchors: anchors(settings)?,
        check_name: settings.mode == SslMode::VerifyFull,
        algorithms: provider.signature_verification_algorithms,
    });
    let failed = |error: rustls::Error| Error::new(ErrorKind::PostgresDenied, "TLS cannot be set up").because(error);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(failed)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match client_certificate(settings)? {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(failed)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// The name that the handshake sends. A host that is no valid name is only an obstacle where names are verified.
pub(super) fn server_name(host: &str, mode: SslMode) -> Result<ServerName<'static>> {
    match ServerName::try_from(host.to_owned()) {
        Ok(name) => Ok(name),
        Err(_) if mode != SslMode::VerifyFull => Ok(ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())),
        Err(error) => {
            let message = format!("`{host}` is no name that a certificate can be made out to");
            Err(Error::new(ErrorKind::PostgresDenied, message).because(error))
        }
    }
}

/// What `SCRAM-SHA-256-PLUS` is bound to: `tls-server-end-point` (RFC 5929 §4.1), the hash of the server's
/// certificate by the hash algorithm of its signature, SHA-256 for MD5 and SHA-1. `None` where the signature has no
/// such hash (Ed25519).
pub(super) fn end_point_binding(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    use rfc5912::*;
    let signature = parse(certificate).ok()?.signature_algorithm.oid;
    let is = |algorithms: &[x509_cert::der::oid::ObjectIdentifier]| algorithms.contains(&signature);
    if is(&[MD_5_WITH_RSA_ENCRYPTION, SHA_1_WITH_RSA_ENCRYPTION, ECDSA_WITH_SHA_256, SHA_256_WITH_RSA_ENCRYPTION]) {
        Some(Sha256::digest(certificate).to_vec())
    } else if is(&[ECDSA_WITH_SHA_384, SHA_384_WITH_RSA_ENCRYPTION]) {
        Some(Sha384::digest(certificate).to_vec())
    } else if is(&[ECDSA_WITH_SHA_512, SHA_512_WITH_RSA_ENCRYPTION]) {
        Some(Sha512::digest(certificate).to_vec())
    } else {
        None
    }
}

/// The failure of a handshake, or of the first read after it (where TLS 1.3 says that it refuses the client's
/// certificate).
pub(super) fn handshake_error(host: &str, error: &io::Error) -> Option<Error> {
    let cause = error.get_ref()?.downcast_ref::<rustls::Error>()?.clone();
    let hint = match &cause {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "name the file with the server's root certificate in `sslrootcert` (`system` for the public ones)"
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "connect by a name that the certificate is made out to; `sslmode=verify-ca` accepts any name",
        rustls::Error::AlertReceived(_) => {
            "the server ended the handshake; if it asks for a client certificate, `sslcert` and `sslkey` name it"
        }
        _ => "the server's log may say more",
    };
    let message = format!("no TLS connection to Postgres at {host}");
    Some(Error::new(ErrorKind::PostgresDenied, message).because(cause).hint(hint))
}

/// The root certificates, and the same ones as bytes, for a server that shows a root itself.
#[derive(Debug)]
struct Anchors {
    store: RootCertStore,
    certificates: Vec<CertificateDer<'static>>,
}

fn anchors(settings: &TlsSettings) -> Result<Option<Anchors>> {
    let verified = matches!(settings.mode, SslMode::VerifyCa | SslMode::VerifyFull);
    let certificates = match &settings.roots {
        Roots::File(path) => read_certificates("sslrootcert", path)?,
        Roots::FileIfPresent(path) if path.exists() => read_certificates("sslrootcert", path)?,
        Roots::System => rustls_native_certs::load_native_certs().certs,
        Roots::FileIfPresent(_) | Roots::Missing if verified => Vec::new(),
        Roots::FileIfPresent(_) | Roots::Missing => return Ok(None),
    };
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(certificates.iter().cloned());
    if store.is_empty() {
        return Err(Error::new(ErrorKind::PostgresDenied, "`sslmode` wants roots to verify with, and there are none")
            .hint("name the file with the server's root certificate: `sslrootcert=/path/root.crt`")
            .hint("`sslrootcert=system` takes the ones of the system (package ca-certificates)"));
    }
    Ok(Some(Anchors { store, certificates }))
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn client_certificate(settings: &TlsSettings) -> Result<Option<Identity>> {
    let Some(files) = &settings.client else { return Ok(None) };
    if files.optional && !files.certificate.exists() {
        return Ok(None);
    }
    let chain = read_certificates("sslcert", &files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| {
        let message = format!("`sslkey`: {} holds no readable private key", files.key.display());
        Error::new(ErrorKind::PostgresDenied, message)
            .because(error)
            .hint("it must be PEM and not encrypted: `openssl pkey -in old.key -out new.key`")
    })?;
    Ok(Some((chain, key)))
}

fn read_certificates(parameter: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let unreadable = |error: rustls::pki_types::pem::Error| {
        let message = format!("`{parameter}`: {} holds no readable certificate (PEM)", path.display());
        Error::new(ErrorKind::PostgresDenied, message).because(error)
    };
    let found = CertificateDer::pem_file_iter(path).map_err(unreadable)?;
    let found: Vec<_> = found.collect::<Result<_, _>>().map_err(unreadable)?;
    if found.is_empty() { Err(unreadable(rustls::pki_types::pem::Error::NoItemsFound)) } else { Ok(found) }
}

/// Verifies as much as `sslmode` asks for.
#[derive(Debug)]
struct Verifier {
    /// Without them any certificate will do.
    anchors: Option<Anchors>,
    check_name: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(anchors) = &self.anchors {
            if anchors.certificates.contains(end_entity) {
                verify_validity(end_entity, now)?;
            } else {
                let certificate = ParsedCertificate::try_from(end_entity)?;
                let algorithms = self.algorithms.all;
                verify_server_cert_signed_by_trust_anchor(
                    &certificate,
                    &anchors.store,
                    intermediates,
                    now,
                    algorithms,
                )?;
            }
        }
        if self.check_name {
            verify_name(end_entity, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if ParsedCertificate::try_from(certificate).is_ok() {
            return rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms);
        }
        // X.509 version 1, which openssl made by default for years and rustls does not read. Whether it is trusted was
        // decided above; here it must only have signed the handshake, and for that its bare key is enough.
        let encoding = |_| rustls::Error::from(CertificateError::BadEncoding);
        let key = parse(certificate).map_err(encoding)?.tbs_certificate.subject_public_key_info.to_der();
        let key = SubjectPublicKeyInfoDer::from(key.map_err(encoding)?);
        rustls::crypto::verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn parse(certificate: &CertificateDer<'_>) -> x509_cert::der::Result<Certificate> {
    Certificate::from_der(certificate)
}

fn verify_validity(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), rustls::Error> {
    let validity = parse(certificate).map_err(|_| CertificateError::BadEncoding)?.tbs_certificate.validity;
    let now = Duration::from_secs(now.as_secs());
    if now < validity.not_before.to_unix_duration() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now > validity.not_after.to_unix_duration() {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}

/// By the alternative names; by the common name where there are none.
fn verify_name(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> Result<(), rustls::Error> {
    let parsed = parse(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let extensions = parsed.tbs_certificate.extensions.iter().flatten();
    if extensions.into_iter().any(|extension| extension.extn_id == rfc5280::ID_CE_SUBJECT_ALT_NAME) {
        return verify_server_name(&ParsedCertificate::try_from(certificate)?, name);
    }
    let subject = parsed.tbs_certificate.subject.0.iter().flat_map(|part| part.0.iter());
    // UTF8String, PrintableString and IA5String are all UTF-8; nothing else is written as a host's name.
    let common_name = subject
        .filter(|attribute| attribute.oid == rfc4519::COMMON_NAME)
        .find_map(|attribute| std::str::from_utf8(attribute.value.value()).ok());
    match common_name {
        Some(common) if matches_common_name(common, name.to_str().as_ref()) => Ok(()),
        _ => Err(CertificateError::NotValidForName.into()),
    }
}

/// Without regard to case; `*.` stands for exactly one label.
fn matches_common_name(common: &str, host: &str) -> bool {
    let under_wildcard = || {
        let suffix = common.strip_prefix("*.")?;
        let (label, parent) = host.split_once('.')?;
        Some(!label.is_empty() && suffix.contains('.') && parent.eq_ignore_ascii_case(suffix))
    };
    common.eq_ignore_ascii_case(host) || under_wildcard().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_names_match_as_in_libpq() {
        for (common, host, expected) in [
            ("db.example.org", "DB.example.org", true),
            ("*.example.org", "db.example.org", true),
            ("*.example.org", "a.db.example.org", false),
            ("*.example.org", "example.org", false),
            ("*.org", "example.org", false),
            ("*", "db", false),
            ("db.example.org", "db.example.com", false),
            ("", "db", false),
            ("127.0.0.1", "127.0.0.1", true),
        ] {
            assert_eq!(matches_common_name(common, host), expected, "{common} {host}");
        }
    }

    #[test]
    fn a_host_that_is_no_name_matters_only_where_names_are_verified() {
        assert!(server_name("no name", SslMode::Require).is_ok());
        assert!(server_name("no name", SslMode::VerifyFull).is_err());
        assert!(matches!(server_name("::1", SslMode::VerifyFull), Ok(ServerName::IpAddress(_))));
    }
}
