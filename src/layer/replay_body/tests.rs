use std::collections::VecDeque;
use std::convert::Infallible;

use http_body_util::BodyExt;
use tokio::sync::mpsc;

use super::*;

/// A body whose chunks come from a channel. It does not clone.
struct Chunks {
    chunks: mpsc::UnboundedReceiver<Result<Frame<Bytes>, &'static str>>,
    length: Option<u64>,
}

impl Body for Chunks {
    type Data = Bytes;
    type Error = &'static str;
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        self.chunks.poll_recv(cx)
    }
    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}

type Sender = mpsc::UnboundedSender<Result<Frame<Bytes>, &'static str>>;

fn body(max_bytes: usize) -> (Sender, ReplayBody<Chunks>) {
    let (sender, chunks) = mpsc::unbounded_channel();
    (
        sender,
        ReplayBody::new(
            Chunks {
                chunks,
                length: None,
            },
            max_bytes,
        ),
    )
}

fn data(text: &'static str) -> Result<Frame<Bytes>, &'static str> {
    Ok(Frame::data(Bytes::from_static(text.as_bytes())))
}

async fn read(body: ReplayBody<Chunks>) -> (Bytes, Option<HeaderMap>) {
    let collected = body.collect().await.unwrap();
    let trailers = collected.trailers().cloned();
    (collected.to_bytes(), trailers)
}

#[tokio::test]
async fn every_copy_sends_the_same_bytes_and_trailers() {
    let (sender, body) = body(100);
    let mut trailers = HeaderMap::new();
    trailers.insert("checksum", http::HeaderValue::from_static("1"));
    sender.send(data("hel")).unwrap();
    sender.send(data("lo")).unwrap();
    sender.send(Ok(Frame::trailers(trailers.clone()))).unwrap();
    drop(sender);
    let (one, two) = (body.replay().unwrap(), body.replay().unwrap());
    for body in [body, one, two] {
        let again = body.replay();
        assert_eq!(
            read(body).await,
            (Bytes::from("hello"), Some(trailers.clone()))
        );
        assert!(again.is_some());
    }
}

#[tokio::test]
async fn a_copy_taken_before_any_data_doubles_no_bytes() {
    // linkerd2#15649: a retry before the first DATA frame doubled the body.
    let (sender, mut first) = body(100);
    let template = first.replay().unwrap();
    let early = futures_poll(&mut first).await;
    assert!(early.is_pending());
    let second = template.replay().unwrap();
    sender.send(data("abc")).unwrap();
    drop(sender);
    assert_eq!(read(second).await.0, "abc");
    assert_eq!(read(template.replay().unwrap()).await.0, "abc");
}

async fn futures_poll(
    body: &mut ReplayBody<Chunks>,
) -> Poll<Option<Result<Frame<Bytes>, ReplayBodyError>>> {
    std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *body).poll_frame(cx))).await
}

#[tokio::test]
async fn a_retry_in_the_middle_goes_on_where_the_first_attempt_stopped() {
    let (sender, mut first) = body(100);
    let template = first.replay().unwrap();
    sender.send(data("one,")).unwrap();
    first.frame().await.unwrap().unwrap();
    drop(first);
    sender.send(data("two")).unwrap();
    drop(sender);
    assert_eq!(read(template.replay().unwrap()).await.0, "one,two");
}

#[tokio::test]
async fn an_attempt_that_still_sends_is_ended_by_a_later_one() {
    let (sender, mut first) = body(100);
    let template = first.replay().unwrap();
    sender.send(data("one,")).unwrap();
    first.frame().await.unwrap().unwrap();
    // The first attempt now waits for more, in the client's own task.
    let waiting = tokio::spawn(async move { first.frame().await });
    tokio::task::yield_now().await;
    let mut second = template.replay().unwrap();
    second.frame().await.unwrap().unwrap();
    let error = waiting.await.unwrap().unwrap().unwrap_err();
    assert!(error.is_superseded() && !error.is_too_long());
    sender.send(data("two")).unwrap();
    drop(sender);
    assert_eq!(second.collect().await.unwrap().to_bytes(), "two");
}

#[tokio::test]
async fn past_the_cap_the_attempt_goes_on_and_there_is_no_copy() {
    let (sender, first) = body(5);
    let template = first.replay().unwrap();
    for chunk in ["123", "45", "6", "789"] {
        sender.send(data(chunk)).unwrap();
    }
    drop(sender);
    assert_eq!(read(first).await.0, "123456789");
    assert!(template.replay().is_none());
}

#[tokio::test]
async fn up_to_the_cap_there_is_a_copy() {
    let (sender, first) = body(5);
    let template = first.replay().unwrap();
    sender.send(data("123")).unwrap();
    sender.send(data("45")).unwrap();
    drop(sender);
    assert_eq!(read(first).await.0, "12345");
    assert_eq!(read(template.replay().unwrap()).await.0, "12345");
}

#[tokio::test]
async fn a_body_known_to_be_too_long_is_not_kept() {
    let (_sender, chunks) = mpsc::unbounded_channel();
    let body = ReplayBody::new(
        Chunks {
            chunks,
            length: Some(6),
        },
        5,
    );
    assert!(body.replay().is_none());
}

fn body_of_length(length: u64, chunks: &[&'static str]) -> ReplayBody<Chunks> {
    let (sender, receiver) = mpsc::unbounded_channel();
    for chunk in chunks {
        sender.send(data(chunk)).unwrap();
    }
    let source = Chunks {
        chunks: receiver,
        length: Some(length),
    };
    ReplayBody::new(source, 100)
}

#[tokio::test]
async fn a_body_that_is_not_as_long_as_it_says_fails() {
    for chunks in [&["123"][..], &["123", "45", "6"]] {
        let body = body_of_length(5, chunks);
        let copy = body.replay().unwrap();
        let error = body.collect().await.unwrap_err();
        assert_eq!(error.source().unwrap().to_string(), OTHER_LENGTH);
        assert!(copy.collect().await.is_err(), "{chunks:?}");
    }
    let body = body_of_length(5, &["123", "", "45"]);
    let copy = body.replay().unwrap();
    assert_eq!(body.collect().await.unwrap().to_bytes(), "12345");
    assert_eq!(copy.collect().await.unwrap().to_bytes(), "12345");
}

#[tokio::test]
async fn a_waiting_copy_does_not_wake_itself() {
    let (_sender, first) = body(100);
    let mut copy = tokio_test::task::spawn(first.replay().unwrap());
    for _ in 0..2 {
        assert!(copy.enter(|cx, copy| copy.poll_frame(cx)).is_pending());
        assert!(!copy.is_woken());
    }
}

#[tokio::test]
async fn a_body_that_failed_is_not_sent_again() {
    let (sender, first) = body(100);
    let template = first.replay().unwrap();
    sender.send(data("one")).unwrap();
    sender.send(Err("disk")).unwrap();
    let error = first.collect().await.unwrap_err();
    assert!(!error.is_superseded());
    assert_eq!(error.to_string(), "the request body failed");
    assert_eq!(error.into_inner().unwrap().to_string(), "disk");
    assert!(template.replay().is_none());
}

fn is_unknown(body: &ReplayBody<Chunks>) -> bool {
    let hint = body.size_hint();
    !body.is_end_stream() && (hint.lower(), hint.upper()) == (0, None)
}

// linkerd also returns an error. The tail alone used to be sent as if it were the whole.
#[tokio::test]
async fn a_copy_that_is_read_after_the_cap_was_passed_is_an_error() {
    for read in ["123", "1"] {
        let (sender, mut first) = body(5);
        sender.send(data(read)).unwrap();
        first.frame().await.unwrap().unwrap();
        // Made in time, as before a drain and a wait.
        let copy = first.replay().unwrap();
        sender.send(data("45678")).unwrap();
        sender.send(data("tail")).unwrap();
        drop(sender);
        first.frame().await.unwrap().unwrap();
        assert!(is_unknown(&copy));
        let error = copy.collect().await.unwrap_err();
        assert!(error.is_too_long());
        assert!(error.to_string().contains("longer than what is kept"));
    }
}

#[tokio::test]
async fn a_copy_that_is_read_after_the_source_failed_is_an_error() {
    let (sender, mut first) = body(100);
    let copy = first.replay().unwrap();
    sender.send(data("one")).unwrap();
    sender.send(Err("disk")).unwrap();
    drop(sender);
    first.frame().await.unwrap().unwrap();
    first.frame().await.unwrap().unwrap_err();
    // The failed copy does not end successfully afterwards either.
    assert!(first.frame().await.unwrap().is_err());
    assert!(is_unknown(&copy));
    let error = copy.collect().await.unwrap_err();
    assert_eq!(error.to_string(), "the request body failed before");
    assert!(error.into_inner().is_none());
}

// Copies used to be numbered by their first poll, and an abandoned attempt then took the source
// from its successor.
#[tokio::test]
async fn a_copy_that_is_read_late_takes_nothing_from_a_later_one() {
    let (sender, first) = body(5);
    let abandoned = first.replay().unwrap();
    let mut latest = first.replay().unwrap();
    sender.send(data("123")).unwrap();
    latest.frame().await.unwrap().unwrap();
    for late in [first, abandoned] {
        assert!(is_unknown(&late));
        assert!(late.collect().await.unwrap_err().is_superseded());
    }
    sender.send(data("4567")).unwrap();
    drop(sender);
    assert_eq!(latest.collect().await.unwrap().to_bytes(), "4567");
}

#[tokio::test]
async fn empty_frames_take_no_room_and_are_not_kept() {
    let (sender, first) = body(5);
    let copy = first.replay().unwrap();
    for _ in 0..200_000 {
        sender.send(data("")).unwrap();
    }
    sender.send(data("12345")).unwrap();
    drop(sender);
    assert_eq!(read(first).await.0, "12345");
    assert_eq!(copy.lock().kept.len(), 5);
    assert_eq!(read(copy).await.0, "12345");
}

#[tokio::test]
async fn trailers_take_room() {
    let mut trailers = HeaderMap::new();
    trailers.insert("name", HeaderValue::from_static("value"));
    for (cap, is_kept) in [(12, true), (11, false)] {
        let (sender, first) = body(cap);
        let copy = first.replay().unwrap();
        sender.send(data("123")).unwrap();
        sender.send(Ok(Frame::trailers(trailers.clone()))).unwrap();
        drop(sender);
        assert_eq!(
            read(first).await,
            (Bytes::from("123"), Some(trailers.clone()))
        );
        match copy.collect().await {
            Ok(again) => assert!(is_kept && again.trailers() == Some(&trailers)),
            Err(error) => assert!(!is_kept && error.is_too_long()),
        }
    }
}

#[tokio::test]
async fn a_body_that_goes_on_after_its_trailers_fails() {
    for more in [data("more"), Ok(Frame::trailers(HeaderMap::new()))] {
        let (sender, first) = body(100);
        let copy = first.replay().unwrap();
        sender.send(Ok(Frame::trailers(HeaderMap::new()))).unwrap();
        sender.send(more).unwrap();
        drop(sender);
        let error = first.collect().await.unwrap_err();
        assert!(
            error
                .source()
                .unwrap()
                .to_string()
                .contains("after its trailers")
        );
        assert!(copy.collect().await.is_err());
    }
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        /// The source yields this many bytes, or none.
        Bring(usize),
        Fail,
        End,
        /// Another copy is made.
        Copy,
        /// One of the copies is polled.
        Poll(prop::sample::Index),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..6_usize).prop_map(Step::Bring),
            1 => Just(Step::Fail),
            1 => Just(Step::End),
            3 => Just(Step::Copy),
            12 => any::<prop::sample::Index>().prop_map(Step::Poll),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

        // A copy that ends successfully has sent the whole body, whichever copies are
        // abandoned, read late, cut short or too long.
        #[test]
        fn a_copy_is_byte_exact_or_an_error(
            cap in 0..12_usize,
            steps in proptest::collection::vec(step(), 1..60),
        ) {
            let (sender, first) = body(cap);
            let mut sender = Some(sender);
            let mut whole = Vec::new();
            let mut failed = false;
            let mut copies = vec![(first, Vec::new(), false)];
            let mut cx = Context::from_waker(Waker::noop());
            for step in steps {
                match step {
                    Step::Bring(length) => {
                        let Some(sender) = &sender else { continue };
                        let from = whole.len() as u8;
                        let bytes: Vec<u8> = (from..).take(length).collect();
                        whole.extend_from_slice(&bytes);
                        sender.send(Ok(Frame::data(bytes.into()))).unwrap();
                    }
                    Step::Fail => {
                        if let Some(sender) = sender.take() {
                            sender.send(Err("disk")).unwrap();
                            failed = true;
                        }
                    }
                    Step::End => drop(sender.take()),
                    Step::Copy => {
                        let copy = copies[copies.len() - 1].0.replay();
                        copies.extend(copy.map(|copy| (copy, Vec::new(), false)));
                    }
                    Step::Poll(index) => {
                        let (copy, sent, done) = index.get_mut(&mut copies);
                        if *done {
                            continue;
                        }
                        let exact = copy.size_hint().exact();
                        if copy.is_end_stream() {
                            prop_assert!(sender.is_none() && !failed);
                            prop_assert_eq!(&*sent, &whole);
                        }
                        match Pin::new(copy).poll_frame(&mut cx) {
                            Poll::Pending => {}
                            Poll::Ready(None) => {
                                prop_assert!(sender.is_none() && !failed);
                                prop_assert_eq!(&*sent, &whole);
                                *done = true;
                            }
                            Poll::Ready(Some(Ok(frame))) => {
                                prop_assert!(exact != Some(0));
                                sent.extend_from_slice(&frame.into_data().unwrap());
                                prop_assert!(whole.starts_with(sent));
                            }
                            Poll::Ready(Some(Err(_))) => *done = true,
                        }
                    }
                }
                prop_assert!(copies[0].0.lock().kept.capacity() <= cap);
            }
        }
    }
}

#[test]
fn an_error_of_the_source_is_kept_as_the_source() {
    let error = ReplayBodyError(Fault::Source("disk".into()));
    assert_eq!(error.source().unwrap().to_string(), "disk");
    let error = ReplayBodyError(Fault::Superseded);
    assert!(error.source().is_none() && error.is_superseded());
}

#[tokio::test]
async fn size_and_end_are_known_as_far_as_the_source_knows_them() {
    let whole = ReplayBody::new(http_body_util::Full::<Bytes>::from("hello"), 100);
    let template = whole.replay().unwrap();
    assert_eq!(whole.size_hint().exact(), Some(5));
    assert_eq!(whole.collect().await.unwrap().to_bytes(), "hello");
    let again = template.replay().unwrap();
    assert_eq!(again.size_hint().exact(), Some(5));
    assert!(!again.is_end_stream());
    let (sender, mut begun) = body(100);
    sender.send(data("hel")).unwrap();
    begun.frame().await.unwrap().unwrap();
    assert_eq!(begun.size_hint().lower(), 0);
    assert_eq!(begun.replay().unwrap().size_hint().lower(), 3);
    let empty = ReplayBody::new(http_body_util::Empty::<Bytes>::new(), 100);
    assert!(empty.is_end_stream());
    assert_eq!(empty.size_hint().exact(), Some(0));
    let (_sender, unknown) = body(100);
    assert_eq!(
        (unknown.size_hint().lower(), unknown.size_hint().upper()),
        (0, None)
    );
}

#[tokio::test]
async fn data_that_is_not_bytes_is_kept_too() {
    struct Deque(Option<VecDeque<u8>>);
    impl Body for Deque {
        type Data = VecDeque<u8>;
        type Error = Infallible;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<VecDeque<u8>>, Infallible>>> {
            Poll::Ready(self.0.take().map(|data| Ok(Frame::data(data))))
        }
    }
    let body = ReplayBody::new(Deque(Some(VecDeque::from(*b"abc"))), 100);
    let again = body.replay().unwrap();
    assert_eq!(body.collect().await.unwrap().to_bytes(), "abc");
    assert_eq!(again.collect().await.unwrap().to_bytes(), "abc");
}
