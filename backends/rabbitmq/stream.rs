//! The stream between lapin and the server: what comes in passes [`tame`](super::tame) frame by frame.
//!
//! Lapin takes a stream of one's own only from a runtime of one's own. [`Kit`] is tokio's but for that.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use async_rs::{
    Runtime, Tokio,
    traits::{Executor, Reactor, RuntimeKit},
    util::Task,
};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::{
    Connection, ConnectionProperties,
    tcp::{AMQPUriTcpExt as _, AsyncTcpStream, OwnedTLSConfig},
    uri::AMQPUri,
};

use super::tame::{frame, tame};

/// What is read at once, and what holds a frame that is no longer.
const ROOM: usize = 32 << 10;

/// Connects as lapin does, with this stream between.
pub(super) async fn connect(
    uri: AMQPUri,
    tls: OwnedTLSConfig,
    properties: ConnectionProperties,
) -> lapin::Result<Connection> {
    let tokio = Runtime::new(Tokio::current());
    let connect = async move |uri: AMQPUri, _: Runtime<Kit>| {
        let stream = uri.connect_with_config_async(tls.as_ref(), &tokio).await?;
        Ok(AsyncTcpStream::Plain(Tame::new(stream)))
    };
    let kit = Runtime::new(Kit(Tokio::current()));
    Connection::connector(uri, kit, connect, properties).await
}

type Server = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// Hands out whole frames, tamed. What is written goes through as it is.
pub(super) struct Tame<S> {
    stream: S,
    buffer: Vec<u8>,
    /// Up to where the buffer was handed out, is tame and whole, was filled.
    handed: usize,
    tame: usize,
    filled: usize,
}

impl<S: AsyncRead + Unpin> Tame<S> {
    fn new(stream: S) -> Self {
        Self {
            stream,
            buffer: vec![0; ROOM],
            handed: 0,
            tame: 0,
            filled: 0,
        }
    }

    /// Reads once more. False: the stream is at its end, and what there is of a frame goes out as it is.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        self.buffer.copy_within(self.handed..self.filled, 0);
        self.filled -= self.handed;
        (self.handed, self.tame) = (0, 0);
        if self.filled == self.buffer.len() {
            self.buffer.resize(2 * self.filled, 0);
        }
        let room = &mut self.buffer[self.filled..];
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, room))?;
        self.filled += read;
        while let Some(size) = frame(&self.buffer[self.tame..self.filled]) {
            tame(&mut self.buffer[self.tame..self.tame + size]);
            self.tame += size;
        }
        if read == 0 {
            self.tame = self.filled;
        }
        Poll::Ready(Ok(read > 0))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Tame<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        while this.handed == this.tame && ready!(this.poll_fill(cx))? {}
        let size = to.len().min(this.tame - this.handed);
        to[..size].copy_from_slice(&this.buffer[this.handed..this.handed + size]);
        this.handed += size;
        Poll::Ready(Ok(size))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tame<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

/// Tokio, whose streams are ours.
#[derive(Clone, Debug)]
pub(super) struct Kit(Tokio);

impl RuntimeKit for Kit {}

impl Executor for Kit {
    type Task<T: Send + 'static> = <Tokio as Executor>::Task<T>;

    fn block_on<T, F: Future<Output = T>>(&self, f: F) -> T {
        self.0.block_on(f)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
        &self,
        f: F,
    ) -> Task<Self::Task<T>> {
        self.0.spawn(f)
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(
        &self,
        f: F,
    ) -> Task<Self::Task<T>> {
        self.0.spawn_blocking(f)
    }
}

impl Reactor for Kit {
    type TcpStream = Tame<Server>;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// Lapin has one stream, which [`connect`] makes.
    fn register<H: Send + 'static>(
        &self,
        _socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Self::TcpStream, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connected = self.0.tcp_connect_addr(address);
        async move { Ok(Tame::new(AsyncTcpStream::Plain(connected.await?))) }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        io,
        pin::Pin,
        task::{Context, Poll},
    };

    use super::{AsyncRead, ROOM, Tame};

    /// Hands out its bytes a few at a time, as a network may.
    struct Drip {
        bytes: Vec<u8>,
        at: usize,
        each: usize,
    }

    impl AsyncRead for Drip {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            to: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            let this = self.get_mut();
            let size = this.each.min(to.len()).min(this.bytes.len() - this.at);
            to[..size].copy_from_slice(&this.bytes[this.at..this.at + size]);
            this.at += size;
            Poll::Ready(Ok(size))
        }
    }

    /// Every byte comes through, in its order, however they come and go; what is cut short at the end too.
    #[tokio::test]
    async fn p6_every_byte_comes_through() {
        let mut bytes = Vec::<u8>::new();
        for size in [0, 1, 5_000, 3 * ROOM, 7] {
            bytes.extend([3, 0, 1]);
            bytes.extend(u32::try_from(size).unwrap().to_be_bytes());
            bytes.extend((0..size).map(|n| u8::try_from(n % 251).unwrap()));
            bytes.push(206);
        }
        bytes.extend([3, 0, 1, 0, 0, 1, 0, 9, 9]);
        for (each, room) in [(1, 1_000), (7, 3), (4_096, 4_096), (usize::MAX, 1 << 20)] {
            let mut stream = Tame::new(Drip {
                bytes: bytes.clone(),
                at: 0,
                each,
            });
            let (mut came, mut room) = (Vec::<u8>::new(), vec![0; room]);
            loop {
                let read = poll_fn(|cx| Pin::new(&mut stream).poll_read(cx, &mut room)).await;
                match read.unwrap() {
                    0 => break,
                    read => came.extend(&room[..read]),
                }
            }
            assert!(came == bytes, "{each} bytes at a time");
        }
    }
}
