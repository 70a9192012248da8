//! The proxy before a plain echo server, each fault shown to be one.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::*;

/// Echoes, and notes what it got, over all connections.
struct Echo {
    address: SocketAddr,
    got: Arc<Mutex<Vec<u8>>>,
}

impl Echo {
    async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let got = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&got);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let got = Arc::clone(&noted);
                tokio::spawn(async move {
                    let mut buffer = [0; 4096];
                    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                        lock(&got).extend(&buffer[..n]);
                        if stream.write_all(&buffer[..n]).await.is_err() {
                            break;
                        }
                    }
                });
            }
        });
        Self { address, got }
    }

    /// What it got, once that is this much and a while for more has passed.
    async fn got_all(&self, bytes: usize) -> Vec<u8> {
        let enough = async {
            while self.got().len() < bytes {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, enough).await.expect("it arrives");
        sleep(A_WHILE).await;
        self.got()
    }

    fn got(&self) -> Vec<u8> {
        lock(&self.got).clone()
    }
}

async fn both(protocol: Option<Protocol>) -> (Echo, Proxy) {
    let echo = Echo::start().await;
    let proxy = Proxy::start(echo.address, protocol).await.unwrap();
    (echo, proxy)
}

async fn connect(proxy: &Proxy) -> TcpStream {
    TcpStream::connect(proxy.address()).await.unwrap()
}

const SOON: Duration = Duration::from_secs(10);
const A_WHILE: Duration = Duration::from_millis(200);

/// Sends and reads the echo.
async fn echoed(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    let mut back = vec![0; bytes.len()];
    timeout(SOON, stream.read_exact(&mut back)).await.unwrap()?;
    assert_eq!(back, bytes);
    Ok(())
}

/// Reads until the end, which has to come; true if it was a reset.
async fn ends(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    let end = timeout(SOON, stream.read_to_end(&mut rest)).await;
    end.expect("an end")
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

async fn is_silent(stream: &mut TcpStream) -> bool {
    timeout(A_WHILE, stream.read_u8()).await.is_err()
}

#[tokio::test]
async fn it_carries_and_counts_and_lets_each_side_close() {
    let (echo, proxy) = both(Some(Protocol::Nats)).await;
    let mut stream = connect(&proxy).await;
    echoed(&mut stream, b"PING\r\nPUB a 2\r\nhi\r\n")
        .await
        .unwrap();
    let large = vec![b'x'; 1 << 20];
    let (mut reader, mut writer) = stream.split();
    let mut back = vec![0; large.len()];
    let (sent, read) = tokio::join!(writer.write_all(&large), reader.read_exact(&mut back));
    assert!(sent.is_ok() && read.is_ok() && back == large);
    writer.shutdown().await.unwrap();
    assert!(!ends(&mut stream).await, "an end, not a reset");
    let bytes = large.len() as u64 + 19;
    let expected = Counts {
        connections: 1,
        bytes_to_broker: bytes,
        bytes_to_client: bytes,
        frames_to_broker: 2,
        frames_to_client: 2,
    };
    assert_eq!(proxy.counts(), expected);
    assert_eq!(echo.got().len() as u64, bytes);
}

#[tokio::test]
async fn a_reset_reaches_every_connection_and_no_later_one() {
    let (_echo, proxy) = both(None).await;
    let mut streams = [connect(&proxy).await, connect(&proxy).await];
    for stream in &mut streams {
        echoed(stream, b"a").await.unwrap();
    }
    proxy.reset();
    for stream in &mut streams {
        assert!(ends(stream).await, "a reset");
    }
    echoed(&mut connect(&proxy).await, b"b").await.unwrap();
}

#[tokio::test]
async fn a_closed_door_refuses_and_what_is_inside_stays() {
    let (_echo, proxy) = both(None).await;
    let mut inside = connect(&proxy).await;
    echoed(&mut inside, b"a").await.unwrap();
    for _ in 0..3 {
        proxy.door(Door::Closed).await;
        let refused = TcpStream::connect(proxy.address()).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        echoed(&mut inside, b"b").await.unwrap();
        proxy.door(Door::Open).await;
        echoed(&mut connect(&proxy).await, b"c").await.unwrap();
    }
}

#[tokio::test]
async fn a_slammed_door_resets_and_tells_when() {
    let (_echo, proxy) = both(None).await;
    proxy.door(Door::Slammed).await;
    let before = Instant::now();
    assert!(ends(&mut connect(&proxy).await).await);
    let came = proxy.came();
    assert!(came.len() == 1 && came[0] >= before);
}

#[tokio::test]
async fn a_broker_that_is_down_is_a_reset() {
    let (echo, _) = both(None).await;
    let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = nobody.local_addr().unwrap();
    drop(nobody);
    let proxy = Proxy::start(address, None).await.unwrap();
    assert!(ends(&mut connect(&proxy).await).await);
    assert!(echo.got().is_empty());
}

#[tokio::test]
async fn a_black_hole_is_silent_and_lets_go_when_it_heals() {
    let (echo, proxy) = both(None).await;
    let mut old = connect(&proxy).await;
    echoed(&mut old, b"a").await.unwrap();
    proxy.swallow(Toward::Broker);
    proxy.swallow(Toward::Client);
    let mut new = connect(&proxy).await;
    for stream in [&mut old, &mut new] {
        stream.write_all(b"b").await.unwrap();
        assert!(is_silent(stream).await);
    }
    assert_eq!(echo.got(), b"a");
    proxy.heal();
    for stream in [&mut old, &mut new] {
        assert_eq!(
            timeout(SOON, stream.read_u8()).await.unwrap().unwrap(),
            b'b'
        );
    }
}

#[tokio::test]
async fn a_hole_can_be_in_one_direction() {
    let (echo, proxy) = both(None).await;
    let mut stream = connect(&proxy).await;
    proxy.swallow(Toward::Client);
    stream.write_all(b"a").await.unwrap();
    assert!(is_silent(&mut stream).await);
    assert_eq!(echo.got(), b"a");
}

#[tokio::test]
async fn half_open_ones_stay_silent_and_new_ones_work() {
    let (echo, proxy) = both(None).await;
    let mut old = connect(&proxy).await;
    echoed(&mut old, b"a").await.unwrap();
    proxy.half_open();
    old.write_all(b"lost").await.unwrap();
    let mut new = connect(&proxy).await;
    echoed(&mut new, b"b").await.unwrap();
    assert!(is_silent(&mut old).await);
    assert_eq!(echo.got(), b"ab");
}

#[tokio::test]
async fn a_delay_is_paid_each_way_and_not_for_each_chunk() {
    let (_echo, proxy) = both(None).await;
    let delay = Duration::from_millis(100);
    proxy.delay(delay);
    let mut stream = connect(&proxy).await;
    let started = Instant::now();
    let (mut reader, mut writer) = stream.split();
    let writing = async {
        for _ in 0..20 {
            writer.write_all(b"x").await.unwrap();
            sleep(Duration::from_millis(5)).await;
        }
    };
    let mut back = [0; 20];
    let (_, read) = tokio::join!(writing, reader.read_exact(&mut back));
    read.unwrap();
    let took = started.elapsed();
    assert!(took >= delay * 2, "{took:?}");
    assert!(took < delay * 20, "{took:?}");
}

#[tokio::test]
async fn a_bandwidth_is_kept() {
    let (_echo, proxy) = both(None).await;
    proxy.bandwidth(Some(100_000));
    let mut stream = connect(&proxy).await;
    let started = Instant::now();
    let bytes = vec![b'x'; 30_000];
    let (mut reader, mut writer) = stream.split();
    let mut back = vec![0; bytes.len()];
    let (sent, read) = tokio::join!(writer.write_all(&bytes), reader.read_exact(&mut back));
    assert!(sent.is_ok() && read.is_ok());
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(240), "{took:?}");
}

#[tokio::test]
async fn a_cut_after_bytes_lets_exactly_those_arrive() {
    let (echo, proxy) = both(None).await;
    let mut stream = connect(&proxy).await;
    let mut other = connect(&proxy).await;
    echoed(&mut other, b"").await.unwrap();
    proxy.cut(Toward::Broker, After::Bytes(5), false);
    stream.write_all(b"abc").await.unwrap();
    let mut back = [0; 3];
    stream.read_exact(&mut back).await.unwrap();
    stream.write_all(b"defgh").await.unwrap();
    assert!(ends(&mut stream).await, "a reset for the sender");
    assert!(!proxy.disarm(), "it has happened");
    // The other connection is left alone, and what was cut off never came.
    echoed(&mut other, b"z").await.unwrap();
    let mut got = echo.got_all(6).await;
    got.sort_unstable();
    assert_eq!(got, b"abcdez");
}

#[tokio::test]
async fn a_cut_after_a_frame_lets_whole_frames_arrive_and_can_end_all() {
    let (echo, proxy) = both(Some(Protocol::Redis)).await;
    let mut stream = connect(&proxy).await;
    let mut other = connect(&proxy).await;
    echoed(&mut other, b"+0\r\n").await.unwrap();
    proxy.cut(Toward::Broker, After::Frames(2), true);
    stream.write_all(b"+1\r\n$1\r\n2\r\n+3\r\n").await.unwrap();
    assert!(ends(&mut stream).await, "a reset for the sender");
    assert!(ends(&mut other).await, "a reset for the others");
    assert!(!proxy.disarm());
    let arrives = b"+0\r\n+1\r\n$1\r\n2\r\n";
    assert_eq!(echo.got_all(arrives.len()).await, arrives);
    assert_eq!(proxy.counts().frames_to_broker, 3);
}

#[tokio::test]
async fn a_cut_on_the_way_back_ends_for_the_client_behind_the_frame() {
    let (_echo, proxy) = both(Some(Protocol::Redis)).await;
    let mut stream = connect(&proxy).await;
    proxy.cut(Toward::Client, After::Frames(1), false);
    stream.write_all(b"+1\r\n+2\r\n").await.unwrap();
    let mut back = Vec::new();
    let read = timeout(SOON, stream.read_to_end(&mut back)).await.unwrap();
    assert!(read.is_ok(), "an orderly end: {read:?}");
    assert_eq!(back, b"+1\r\n");
}

#[tokio::test]
async fn a_cut_that_does_not_happen_can_be_taken_back() {
    let (_echo, proxy) = both(Some(Protocol::Redis)).await;
    let mut stream = connect(&proxy).await;
    proxy.cut(Toward::Broker, After::Frames(3), true);
    echoed(&mut stream, b"+1\r\n+2\r\n").await.unwrap();
    assert!(proxy.disarm(), "it was still armed");
    echoed(&mut stream, b"+3\r\n+4\r\n").await.unwrap();
}
