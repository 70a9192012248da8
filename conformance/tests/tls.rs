//! Law S3: TLS with host name check and client certificates, against the real servers and an
//! authority of the test's own. Each way to be wrong is an error that says so; none is a connection.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    sync::Arc,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use tempfile::TempDir;
use tokio::net::TcpStream;
use wilco::{
    Broker, Deadline, ErrorKind, GuestAddress, GuestId, Message,
    broker::{DeleteMode, QueueSpec},
};
use wilco_conformance::{
    harnesses::rabbitmq,
    process::{Process, free_port},
};

/// Long enough for any handshake, short enough to wait for one that is refused.
const WITHIN: Duration = Duration::from_secs(5);

/// The one name in the servers' certificates. The address 127.0.0.1 is not in them.
const NAME: &str = "localhost";

/// An authority, and what it signed: PEM files in a directory.
struct Pki {
    directory: TempDir,
}

impl Pki {
    fn new() -> Self {
        let directory = TempDir::with_prefix("wilco-tls-").expect("a directory");
        let authority = authority("the test's authority");
        let pki = Self { directory };
        pki.write("ca.pem", &authority.pem());
        pki.sign(&authority, "server", &server_params());
        let mut expired = server_params();
        expired.not_before = date_time_ymd(2001, 1, 1);
        expired.not_after = date_time_ymd(2001, 2, 1);
        pki.sign(&authority, "expired", &expired);
        let mut client = CertificateParams::new(Vec::new()).expect("no names");
        client.distinguished_name.push(DnType::CommonName, "vm-1");
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        pki.sign(&authority, "client", &client);
        pki.write("other-ca.pem", &self::authority("somebody else").pem());
        pki
    }

    fn sign(
        &self,
        authority: &CertifiedIssuer<'_, KeyPair>,
        name: &str,
        params: &CertificateParams,
    ) {
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, authority).expect("a certificate");
        self.write(&format!("{name}.pem"), &certificate.pem());
        self.write(&format!("{name}.key"), &key.serialize_pem());
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.directory.path().join(name), text).expect("a file");
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }
}

fn authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority")
}

fn server_params() -> CertificateParams {
    let mut params = CertificateParams::new(vec![NAME.into()]).expect("a name");
    params.distinguished_name.push(DnType::CommonName, NAME);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params
}

/// What a server's TLS is like.
#[derive(Clone, Copy)]
struct Setup {
    /// The certificate that it shows; `None`: it speaks no TLS at all.
    certificate: Option<&'static str>,
    /// Whether it wants one of the client too.
    mutual: bool,
}

const PLAIN: Setup = Setup {
    certificate: None,
    mutual: false,
};
const SERVER: Setup = Setup {
    certificate: Some("server"),
    mutual: false,
};
const EXPIRED: Setup = Setup {
    certificate: Some("expired"),
    mutual: false,
};
const MUTUAL: Setup = Setup {
    certificate: Some("server"),
    mutual: true,
};

/// A kind of broker: its URL's scheme and how its server is started.
#[derive(Clone, Copy)]
struct Kind {
    scheme: &'static str,
    command: fn(&Pki, Setup, u16, &Path) -> Command,
}

const REDIS: Kind = Kind {
    scheme: "rediss",
    command: |pki, setup, port, directory| {
        let mut command = Command::new("redis-server");
        command.current_dir(directory).args([
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "yes",
        ]);
        let port = port.to_string();
        match setup.certificate {
            None => command.args(["--port", &port]),
            Some(name) => command.args([
                "--port",
                "0",
                "--tls-port",
                &port,
                "--tls-cert-file",
                &pki.path(&format!("{name}.pem")),
                "--tls-key-file",
                &pki.path(&format!("{name}.key")),
                "--tls-ca-cert-file",
                &pki.path("ca.pem"),
                "--tls-auth-clients",
                if setup.mutual { "yes" } else { "no" },
            ]),
        };
        command
    },
};

const NATS: Kind = Kind {
    scheme: "tls",
    command: |pki, setup, port, directory| {
        let mut command = Command::new("nats-server");
        let store = directory.join("store").display().to_string();
        command.args([
            "-a",
            "127.0.0.1",
            "-p",
            &port.to_string(),
            "-js",
            "-sd",
            &store,
        ]);
        if let Some(name) = setup.certificate {
            command
                .arg(format!("--tlscert={}", pki.path(&format!("{name}.pem"))))
                .arg(format!("--tlskey={}", pki.path(&format!("{name}.key"))));
            if setup.mutual {
                command
                    .arg("--tlsverify")
                    .arg(format!("--tlscacert={}", pki.path("ca.pem")));
            } else {
                command.arg("--tls");
            }
        }
        command
    },
};

/// A client shows who it is by its certificate alone, where it has one: the user is its common name.
const RABBITMQ: Kind = Kind {
    scheme: "amqps",
    command: |pki, setup, port, directory| {
        let configuration = match setup.certificate {
            None => format!("listeners.tcp.1 = 127.0.0.1:{port}\n"),
            Some(name) => {
                let (verify, or_fail, mechanism) = if setup.mutual {
                    ("verify_peer", true, "EXTERNAL")
                } else {
                    ("verify_none", false, "PLAIN")
                };
                format!(
                    "listeners.tcp = none\n\
                     listeners.ssl.1 = 127.0.0.1:{port}\n\
                     ssl_options.cacertfile = {}\n\
                     ssl_options.certfile = {}\n\
                     ssl_options.keyfile = {}\n\
                     ssl_options.verify = {verify}\n\
                     ssl_options.fail_if_no_peer_cert = {or_fail}\n\
                     auth_mechanisms.1 = {mechanism}\n\
                     ssl_cert_login_from = common_name\n\
                     default_user = {}\n",
                    pki.path("ca.pem"),
                    pki.path(&format!("{name}.pem")),
                    pki.path(&format!("{name}.key")),
                    if setup.mutual { "vm-1" } else { "guest" },
                )
            }
        };
        let command = rabbitmq::command(port, &configuration, "rabbitmq_auth_mechanism_ssl");
        command.expect("RabbitMQ is here")(directory)
    },
};

/// A server of this kind and set up like this, which takes connections.
async fn start(kind: Kind, pki: &Arc<Pki>, setup: Setup) -> Process {
    let port = free_port().expect("a port");
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let directory = TempDir::with_prefix("wilco-tls-").expect("a directory");
    let pki = Arc::clone(pki);
    let server = Process::new(address, directory, move |directory| {
        (kind.command)(&pki, setup, port, directory)
    });
    let listens = async || TcpStream::connect(address).await.is_ok();
    server.start(listens).await.expect("the server starts");
    server
}

/// The URL of a server, by this host name, with these options.
fn url(kind: Kind, server: &Process, host: &str, pki: &Pki, options: &[(&str, &str)]) -> String {
    let mut url = format!("{}://{host}:{}", kind.scheme, server.address().port());
    for (n, (option, file)) in options.iter().enumerate() {
        let separator = if n == 0 { "/?" } else { "&" };
        url.push_str(&format!("{separator}{option}={}", pki.path(file)));
    }
    url
}

/// What comes of connecting; an Ok has shown that it works.
async fn attempt(url: &str) -> wilco::Result<()> {
    let broker: Arc<dyn Broker> = wilco::connect_by(url, Deadline::after(WITHIN)).await?;
    let within = || Deadline::after(WITHIN * 2);
    let queue = GuestAddress::from(GuestId::new("tls")?).queue();
    broker
        .declare(&QueueSpec::new(queue.clone()), within())
        .await?;
    broker
        .publish(&queue, Message::new("check", "x")?, within())
        .await?;
    let gone = broker.delete(&queue, DeleteMode::Discard, within()).await?;
    assert_eq!(gone.messages, 1);
    broker.close(within()).await
}

/// Connecting fails with a text that names what is wrong and what to do, and does not wait for the deadline
/// where no time mends it.
async fn wrong(what: &str, advice: &str, url: &str) {
    let (told, took) = refused(what, url).await;
    assert!(told.contains(advice), "{told}");
    assert!(took < WITHIN, "after {took:?}: {told}");
}

/// Connecting fails, in time, with a text that says it is about TLS.
async fn refused(what: &str, url: &str) -> (String, Duration) {
    let started = std::time::Instant::now();
    let error = attempt(url).await.expect_err(what);
    let told = format!("{what}: {error} ({error:?})");
    let took = started.elapsed();
    assert!(took < WITHIN * 2, "{told}");
    assert!(
        matches!(
            error.kind(),
            ErrorKind::BrokerUnreachable | ErrorKind::AuthRefused
        ),
        "{told}"
    );
    let text = error.to_string().to_lowercase();
    let about_tls = ["tls", "certificate", "handshake"];
    assert!(about_tls.iter().any(|word| text.contains(word)), "{told}");
    (told, took)
}

async fn s3(kind: Kind) {
    let pki = Arc::new(Pki::new());
    let (ca, other) = (("ca", "ca.pem"), ("ca", "other-ca.pem"));
    let identity = [ca, ("cert", "client.pem"), ("key", "client.key")];

    let server = start(kind, &pki, SERVER).await;
    let to = |host, options: &[_]| url(kind, &server, host, &pki, options);
    attempt(&to(NAME, &[ca]))
        .await
        .expect("the right name and authority");
    wrong(
        "a name that is not the certificate's",
        "for another host name",
        &to("127.0.0.1", &[ca]),
    )
    .await;
    let not_trusted = "name that authority's certificate with the option ca";
    let stranger = "an authority that did not sign it";
    wrong(stranger, not_trusted, &to(NAME, &[other])).await;
    wrong("the system's authorities", not_trusted, &to(NAME, &[])).await;
    let own = [identity[1], identity[2]];
    let systems = "the system's authorities, with a client's certificate";
    wrong(systems, not_trusted, &to(NAME, &own)).await;

    let server = start(kind, &pki, EXPIRED).await;
    let to = |host, options: &[_]| url(kind, &server, host, &pki, options);
    wrong("an expired certificate", "has expired", &to(NAME, &[ca])).await;

    let server = start(kind, &pki, MUTUAL).await;
    let to = |host, options: &[_]| url(kind, &server, host, &pki, options);
    attempt(&to(NAME, &identity))
        .await
        .expect("a client with its certificate");
    let wanted = "name it and its key with the options cert and key";
    wrong("a client without a certificate", wanted, &to(NAME, &[ca])).await;

    let server = start(kind, &pki, PLAIN).await;
    let to = |host, options: &[_]| url(kind, &server, host, &pki, options);
    let (told, _) = refused("a server that speaks no TLS", &to(NAME, &[ca])).await;
    // Redis just waits for the rest of what it takes for a command.
    assert!(told.contains("speaks no TLS at this port"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_redis() {
    s3(REDIS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_nats() {
    s3(NATS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_rabbitmq() {
    s3(RABBITMQ).await;
}
