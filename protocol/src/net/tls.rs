//! Identities: a certificate authority for each cluster, and a certificate for each process.
//!
//! A certificate carries its holder's identity as a URI, `troth://<cluster id>/<role>/<name>`, and,
//! for servers, the DNS name `<role>.troth`, which callers insist on: so a process with a client's
//! certificate cannot pose as a coordinator. Both sides of every connection show theirs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{Identity, Role};
use crate::id::ClusterId;

/// How long the authority's own certificate is valid.
pub const AUTHORITY_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How long a process's certificate is valid, unless asked otherwise.
pub const CERTIFICATE_VALIDITY: Duration = Duration::from_secs(365 * 24 * 3600);

/// How a revocation list ends.
const CRL_END: &str = "-----END X509 CRL-----";

/// The application protocol that both sides of a connection name.
const ALPN: &[u8] = b"troth";

/// Something is wrong with a certificate or key.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {reason}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate names nobody.
    #[error("the certificate carries no Troth identity (troth://<cluster>/<role>/<name>)")]
    NoIdentity,
    /// A certificate is to be revoked that another authority has issued.
    #[error(
        "the certificate was issued by the authority before this one: `troth authority retire` lets all of those \
         count no more"
    )]
    Stranger,
    /// A name that cannot stand in a certificate.
    #[error("{0:?} cannot be a name: use letters, digits, '-', '_' and '.', at most 64 of them")]
    Name(String),
    /// The library refused.
    #[error("{0}")]
    Certificate(#[from] rcgen::Error),
    /// The library refused.
    #[error("{0}")]
    Tls(#[from] rustls::Error),
    /// The library refused.
    #[error("{0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// A certificate and its private key, as PEM text.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its private key. Whoever has it is who the certificate says.
    pub key: String,
}

/// The authority of a cluster: whoever holds its key can let anybody in.
pub struct Authority {
    cluster: ClusterId,
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new authority for a cluster.
    ///
    /// # Errors
    /// If the library cannot make a key.
    pub fn create(cluster: ClusterId) -> Result<Authority, TlsError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // A name of its own: by it a list of revoked certificates is told from that of another authority.
        let name = format!("Troth cluster {cluster}, authority {:08x}", rand::random::<u32>());
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names.push(uri(&format!("troth://{cluster}"))?);
        set_validity(&mut params, AUTHORITY_VALIDITY);
        let certificate = params.self_signed(&key)?.pem();
        Ok(Authority { cluster, certificate, issuer: Issuer::new(params, key) })
    }

    /// Reads an authority back from its certificate and key.
    ///
    /// # Errors
    /// If the text is not that of an authority.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Authority, TlsError> {
        let der = CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(|_| TlsError::NoIdentity)?;
        let cluster = uris(&der)
            .into_iter()
            .find_map(|uri| uri.strip_prefix("troth://")?.parse().ok())
            .ok_or(TlsError::NoIdentity)?;
        let issuer = Issuer::from_ca_cert_pem(certificate, KeyPair::from_pem(key)?)?;
        Ok(Authority { cluster, certificate: certificate.to_owned(), issuer })
    }

    /// The cluster that this is the authority of.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The authority's certificate, as everybody in the cluster needs it.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// The authority's private key.
    pub fn key(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// Issues a certificate.
    ///
    /// # Errors
    /// If the name has characters that do not belong in one.
    pub fn issue(&self, role: Role, name: &str, validity: Duration) -> Result<Issued, TlsError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
            return Err(TlsError::Name(name.to_owned()));
        }
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("Troth {role} {name}"));
        params.subject_alt_names.push(uri(&format!("troth://{}/{role}/{name}", self.cluster))?);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if matches!(role, Role::Coordinator | Role::Participant) {
            params.subject_alt_names.push(SanType::DnsName(server_name(role).try_into()?));
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        set_validity(&mut params, validity);
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Issued { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// The list of certificates that do not count any more: those of the list before, and these.
    ///
    /// # Errors
    /// If a text is not what it should be.
    pub fn revoke(&self, before: Option<&str>, certificates: &[&str]) -> Result<String, TlsError> {
        let now = time::OffsetDateTime::now_utc();
        let own =
            CertificateDer::from_pem_slice(self.certificate.as_bytes()).map_err(|_| TlsError::NoIdentity)?;
        let (_, own) = X509Certificate::from_der(&own).map_err(|_| TlsError::NoIdentity)?;
        let mut serials: Vec<Vec<u8>> = Vec::new();
        // What other authorities have listed stays as it is: only they can sign it.
        let mut others = String::new();
        for text in before.unwrap_or_default().split_inclusive(CRL_END) {
            for list in revocations(text).ok_or(TlsError::NoIdentity)? {
                let (_, list) = x509_parser::parse_x509_crl(&list).map_err(|_| TlsError::NoIdentity)?;
                if list.issuer() == own.subject() {
                    let listed = list.iter_revoked_certificates();
                    serials.extend(listed.map(|revoked| revoked.raw_serial().to_vec()));
                } else {
                    others += text.trim_start();
                    others.push('\n');
                }
            }
        }
        for certificate in certificates {
            let der =
                CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(|_| TlsError::NoIdentity)?;
            let (_, parsed) = X509Certificate::from_der(&der).map_err(|_| TlsError::NoIdentity)?;
            if parsed.issuer() != own.subject() {
                return Err(TlsError::Stranger);
            }
            serials.push(parsed.raw_serial().to_vec());
        }
        let revoked = |serial: &Vec<u8>| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now - time::Duration::DAY,
            next_update: now + AUTHORITY_VALIDITY,
            crl_number: SerialNumber::from(now.unix_timestamp() as u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&self.issuer)?.pem()? + &others)
    }
}

/// The DNS name in the certificates of servers with a role.
pub fn server_name(role: Role) -> String {
    format!("{role}.troth")
}

fn uri(text: &str) -> Result<SanType, TlsError> {
    Ok(SanType::URI(text.try_into()?))
}

/// Valid from a day ago, so that a clock that is a little behind does not refuse a new certificate.
fn set_validity(params: &mut CertificateParams, validity: Duration) {
    let now = time::OffsetDateTime::now_utc();
    params.not_before = now - time::Duration::DAY;
    params.not_after = now + validity;
}

/// What a process shows others, and whom it believes.
#[derive(Clone, Debug)]
pub struct Credentials {
    identity: Identity,
    /// Several while one takes the place of another.
    authorities: Vec<CertificateDer<'static>>,
    /// Lists of certificates that do not count any more.
    revoked: Vec<CertificateRevocationListDer<'static>>,
    certificate: CertificateDer<'static>,
    key: Arc<PrivateKeyDer<'static>>,
    /// Where they were read from.
    files: Option<CredentialFiles>,
}

/// Where the files of [`Credentials`] lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialFiles {
    /// The authority's certificate; several, one after the other, while one takes the place of another.
    pub ca: PathBuf,
    /// The process's own certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Lists of certificates that do not count any more; `None`: there are none.
    pub crl: Option<PathBuf>,
}

impl CredentialFiles {
    /// The files of a process in a folder laid out by `troth init`: `ca.pem`, `<name>.pem` and
    /// `<name>-key.pem`.
    pub fn in_folder(folder: &Path, name: &str) -> CredentialFiles {
        CredentialFiles {
            ca: folder.join("ca.pem"),
            cert: folder.join(format!("{name}.pem")),
            key: folder.join(format!("{name}-key.pem")),
            crl: Some(folder.join("crl.pem")).filter(|path| path.exists()),
        }
    }

    /// Reads them.
    ///
    /// # Errors
    /// Names the file that is missing or is not what it should be.
    pub fn load(&self) -> Result<Credentials, TlsError> {
        let read = |path: &Path| {
            fs::read_to_string(path).map_err(|source| TlsError::Io { path: path.to_owned(), source })
        };
        let pem =
            |path: &Path, reason: &str| TlsError::Pem { path: path.to_owned(), reason: reason.to_owned() };
        let certificate = |path: &Path| {
            CertificateDer::from_pem_slice(read(path)?.as_bytes())
                .map_err(|_| pem(path, "not a PEM certificate"))
        };
        let own = certificate(&self.cert)?;
        let key = PrivateKeyDer::from_pem_slice(read(&self.key)?.as_bytes())
            .map_err(|_| pem(&self.key, "not a PEM private key"))?;
        let identity = identity_of(&own)
            .ok_or_else(|| pem(&self.cert, "carries no Troth identity; make one with `troth cert`"))?;
        let authorities =
            certificates(&read(&self.ca)?).ok_or_else(|| pem(&self.ca, "not a PEM certificate"))?;
        let revoked = match &self.crl {
            Some(path) => revocations(&read(path)?).ok_or_else(|| pem(path, "not a PEM revocation list"))?,
            None => Vec::new(),
        };
        let files = Some(self.clone());
        let key = Arc::new(key);
        let credentials = Credentials { identity, authorities, revoked, certificate: own, key, files };
        credentials.client_config().map_err(|error| match error {
            TlsError::Tls(rustls::Error::InconsistentKeys(_)) => {
                let cert = self.cert.display();
                pem(
                    &self.key,
                    &format!(
                        "is not the key of the certificate in {cert}; take the pair that belongs together"
                    ),
                )
            }
            error => error,
        })?;
        Ok(credentials)
    }
}

/// All certificates in a PEM text, one at least.
fn certificates(text: &str) -> Option<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    found.ok().filter(|found| !found.is_empty())
}

/// All revocation lists in a PEM text; it may be empty.
fn revocations(text: &str) -> Option<Vec<CertificateRevocationListDer<'static>>> {
    CertificateRevocationListDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>().ok()
}

impl Credentials {
    /// Credentials from PEM text.
    ///
    /// # Errors
    /// If the text is not what it should be.
    pub fn from_pem(authority: &str, issued: &Issued) -> Result<Credentials, TlsError> {
        let certificate =
            |text: &str| CertificateDer::from_pem_slice(text.as_bytes()).map_err(|_| TlsError::NoIdentity);
        let own = certificate(&issued.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).map_err(|_| TlsError::NoIdentity)?;
        let identity = identity_of(&own).ok_or(TlsError::NoIdentity)?;
        let authorities = certificates(authority).ok_or(TlsError::NoIdentity)?;
        let (revoked, key) = (Vec::new(), Arc::new(key));
        Ok(Credentials { identity, authorities, revoked, certificate: own, key, files: None })
    }

    /// The files that they were read from, if they were.
    pub fn files(&self) -> Option<&CredentialFiles> {
        self.files.as_ref()
    }

    /// Whether a certificate that was shown earlier is still believed.
    ///
    /// # Errors
    /// Why it is not.
    pub(super) fn check(&self, shown: &[CertificateDer<'_>]) -> Result<(), String> {
        let (own, others) = shown.split_first().ok_or("no certificate was shown")?;
        let verifier = self.verifier().map_err(|error| error.to_string())?;
        let verified = verifier.verify_client_cert(own, others, UnixTime::now());
        verified.map(drop).map_err(|error| error.to_string())
    }

    /// When the certificate ends: seconds since the Unix epoch.
    pub fn expires_at(&self) -> i64 {
        x509_parser::parse_x509_certificate(&self.certificate)
            .map_or(0, |(_, certificate)| certificate.validity().not_after.timestamp())
    }

    /// Who these say the process is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Bytes that only this certificate's holder knows and that survive a restart: with them a
    /// restarted server can tell old connections at once that they are gone.
    pub(super) fn reset_secret(&self) -> [u8; 32] {
        let digest = ring::digest::digest(&ring::digest::SHA256, self.key.secret_der());
        digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in &self.authorities {
            roots.add(authority.clone())?;
        }
        Ok(Arc::new(roots))
    }

    /// Who tells whether a caller's certificate is believed. A list says nothing of what another authority has signed.
    fn verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let builder = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider());
        let builder = builder.with_crls(self.revoked.clone());
        Ok(builder.only_check_end_entity_revocation().allow_unknown_revocation_status().build()?)
    }

    /// How to accept connections: only with a certificate of this cluster.
    pub(super) fn server_config(&self) -> Result<rustls::ServerConfig, TlsError> {
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(self.verifier()?)
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }

    /// How to make connections.
    pub(super) fn client_config(&self) -> Result<rustls::ClientConfig, TlsError> {
        let builder = WebPkiServerVerifier::builder_with_provider(self.roots()?, provider());
        let builder = builder.with_crls(self.revoked.clone());
        let verifier =
            builder.only_check_end_entity_revocation().allow_unknown_revocation_status().build()?;
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The identity in a certificate that has been verified.
pub(super) fn identity_of(certificate: &CertificateDer<'_>) -> Option<Identity> {
    uris(certificate).into_iter().find_map(|uri| {
        let mut parts = uri.strip_prefix("troth://")?.split('/');
        let cluster = parts.next()?.parse().ok()?;
        let role = parts.next()?.parse().ok()?;
        let name = parts.next()?.to_owned();
        parts.next().is_none().then_some(Identity { cluster, role, name })
    })
}

fn uris(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    names.value.general_names.iter().filter_map(uri).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_carry_identities() {
        let authority = Authority::create(ClusterId([7; 16])).expect("an authority");
        let again = Authority::from_pem(authority.certificate(), &authority.key()).expect("the same one");
        assert_eq!(again.cluster(), ClusterId([7; 16]));
        for role in Role::ALL {
            let issued = again.issue(role, "some-name.1", CERTIFICATE_VALIDITY).expect("a certificate");
            let credentials = Credentials::from_pem(authority.certificate(), &issued).expect("credentials");
            let expected = Identity { cluster: ClusterId([7; 16]), role, name: "some-name.1".into() };
            assert_eq!(credentials.identity(), &expected);
        }
    }

    #[test]
    fn names_that_could_forge_an_identity_are_refused() {
        let authority = Authority::create(ClusterId([7; 16])).expect("an authority");
        for name in ["", "a/b", "a b", "ä", &"x".repeat(65)] {
            let refused = authority.issue(Role::Client, name, CERTIFICATE_VALIDITY);
            assert!(matches!(refused, Err(TlsError::Name(_))), "{name}");
        }
    }

    #[test]
    fn missing_and_broken_files_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = CredentialFiles::in_folder(folder.path(), "app");
        let error = files.load().expect_err("nothing is there").to_string();
        assert!(error.contains("app.pem"), "{error}");
        fs::write(&files.cert, "no certificate").expect("writable");
        let error = files.load().expect_err("garbage").to_string();
        assert!(error.contains("not a PEM certificate"), "{error}");
    }
}
