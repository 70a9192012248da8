//! TLS through rustls; the host's name is always checked (law S3).

use std::sync::Arc;

use async_nats::{
    ConnectOptions,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::{CryptoProvider, ring},
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use crate::{
    endpoint::Tls,
    error::{Error, ErrorKind, Result},
};

pub(super) fn apply(connect: ConnectOptions, tls: &Tls) -> Result<ConnectOptions> {
    let connect = connect.require_tls(true);
    if tls.authorities.is_none() && tls.identity.is_none() {
        // The client builds its own from the system's authorities, with the process's provider.
        if CryptoProvider::get_default().is_none() {
            let _ = ring::default_provider().install_default();
        }
        return Ok(connect);
    }
    let mut roots = RootCertStore::empty();
    match &tls.authorities {
        Some(authorities) => {
            for certificate in certificates(authorities, "ca")? {
                roots
                    .add(certificate)
                    .map_err(|error| invalid(format!("option ca: {error}")))?;
            }
        }
        // As the client does where it has no identity to show. Some of a system's are of odd forms.
        None => _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs),
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| invalid(error.to_string()))?
        .with_root_certificates(roots);
    let config = match &tls.identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let key = PrivateKeyDer::from_pem_slice(&identity.key)
                .map_err(|_| invalid("option key: no private key in PEM form".into()))?;
            builder
                .with_client_auth_cert(certificates(&identity.certificate, "cert")?, key)
                .map_err(|error| invalid(format!("options cert and key: {error}")))?
        }
    };
    Ok(connect.tls_client_config(config))
}

fn certificates(pem: &[u8], option: &str) -> Result<Vec<CertificateDer<'static>>> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match read {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(invalid(format!(
            "option {option}: no certificate in PEM form"
        ))),
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidUrl, message)
}
