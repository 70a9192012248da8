//! What the rounds come to: medians and quartiles, a row of a table each.

use std::time::Duration;

/// Messages per second of both sides, round by round.
#[derive(Default)]
pub(crate) struct Rates {
    raw: Vec<f64>,
    ours: Vec<f64>,
}

impl Rates {
    pub(crate) fn add(&mut self, ours: bool, messages: usize, took: Duration) {
        let rate = messages as f64 / took.as_secs_f64();
        if ours { &mut self.ours } else { &mut self.raw }.push(rate);
    }

    pub(crate) fn print(&self, what: &str) {
        let pairs = self.raw.iter().zip(&self.ours);
        let ratios: Vec<f64> = pairs.map(|(raw, ours)| ours / raw).collect();
        let [low, middle, high] = quartiles(&ratios);
        println!(
            "  {what:<32} raw {:>7.0}/s  wilco {:>7.0}/s  ratio {middle:.2} ({low:.2} to {high:.2})",
            quartiles(&self.raw)[1],
            quartiles(&self.ours)[1],
        );
    }
}

/// Microseconds of both sides, round by round: the median and the 99th percentile of each.
#[derive(Default)]
pub(crate) struct Latencies {
    raw: [Vec<f64>; 2],
    ours: [Vec<f64>; 2],
}

impl Latencies {
    pub(crate) fn add(&mut self, raw: Vec<Duration>, ours: Vec<Duration>) {
        for (times, all) in [(raw, &mut self.raw), (ours, &mut self.ours)] {
            let mut times: Vec<f64> = times.iter().map(|t| t.as_secs_f64() * 1e6).collect();
            times.sort_by(f64::total_cmp);
            all[0].push(times[times.len() / 2]);
            all[1].push(times[times.len() * 99 / 100]);
        }
    }

    pub(crate) fn print(&self, what: &str) {
        for (n, percentile) in ["p50", "p99"].into_iter().enumerate() {
            let (raw, ours) = (&self.raw[n], &self.ours[n]);
            let pairs = raw.iter().zip(ours);
            let more: Vec<f64> = pairs.map(|(raw, ours)| ours - raw).collect();
            let [low, middle, high] = quartiles(&more);
            println!(
                "  {:<32} raw {:>7.0}µs  wilco {:>7.0}µs  more {middle:.0} ({low:.0} to {high:.0})",
                format!("{what}, {percentile}"),
                quartiles(raw)[1],
                quartiles(ours)[1],
            );
        }
    }
}

fn quartiles(of: &[f64]) -> [f64; 3] {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    // Between two where the place is between two.
    let at = |part: f64| {
        let place = part * (sorted.len() - 1) as f64;
        let (low, rest) = (place as usize, place.fract());
        let high = sorted[(low + 1).min(sorted.len() - 1)];
        sorted[low] + (high - sorted[low]) * rest
    };
    [at(0.25), at(0.5), at(0.75)]
}
