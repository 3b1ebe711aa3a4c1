//! Asking an API again and again, to see that it answers whatever else goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use hyper::Method;

use crate::api::Api;

/// What is asked.
const ENDPOINTS: [&str; 4] = ["vm.info", "vm.counters", "vm.migration", "vmm.ping"];

/// Time between two questions.
const PAUSE: Duration = Duration::from_millis(5);

/// How long the answers took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Latency {
    /// Answers.
    pub answers: u32,
    /// The longest time to an answer.
    pub max: Duration,
    /// The endpoint that took it.
    pub slowest: &'static str,
    sum: Duration,
}

impl Latency {
    /// The average time to an answer.
    pub fn mean(&self) -> Duration {
        self.sum.checked_div(self.answers).unwrap_or_default()
    }
}

/// A thread that asks. Any status is an answer: there may be no VM.
#[derive(Debug)]
pub struct Poller {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Latency>>,
}

impl Poller {
    /// Starts asking.
    pub fn start(api: &Api) -> Self {
        let (api, stop) = (api.clone(), Arc::new(AtomicBool::new(false)));
        let thread_stop = Arc::clone(&stop);
        let thread = thread::spawn(move || poll(&api, &thread_stop));
        Self { stop, thread }
    }

    /// Stops asking.
    ///
    /// # Errors
    /// When a question got no answer.
    pub fn stop(self) -> Result<Latency> {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.join();
        joined.map_err(|_| anyhow!("the poller panicked"))?
    }
}

fn poll(api: &Api, stop: &AtomicBool) -> Result<Latency> {
    let mut latency = Latency::default();
    for endpoint in ENDPOINTS.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let asked = Instant::now();
        api.request(Method::GET, endpoint, None)?;
        let took = asked.elapsed();
        latency.answers += 1;
        latency.sum += took;
        if took > latency.max {
            latency.max = took;
            latency.slowest = endpoint;
        }
        thread::sleep(PAUSE);
    }
    Ok(latency)
}
