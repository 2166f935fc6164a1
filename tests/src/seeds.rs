//! Seeds of simulations, many at a time.

use std::sync::atomic::{AtomicU64, Ordering};

/// Reads `FROM..TO`.
///
/// # Errors
/// What it should look like.
pub fn range(text: &str) -> Result<(u64, u64), String> {
    let range = text.split_once("..").and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok()?)));
    range.filter(|(from, to)| from < to).ok_or_else(|| "seeds are FROM..TO, like 0..200".into())
}

/// Does something for each seed, on so many threads.
pub fn each((from, to): (u64, u64), threads: usize, work: impl Fn(u64) + Sync) {
    let next = AtomicU64::new(from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= to {
                        return;
                    }
                    work(seed);
                }
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    #[test]
    fn each_seed_has_its_turn_once() {
        for threads in [1, 3] {
            let seen = Mutex::new(Vec::new());
            each((5, 40), threads, |seed| seen.lock().push(seed));
            let mut seen = seen.into_inner();
            seen.sort();
            assert_eq!(seen, (5..40).collect::<Vec<_>>());
        }
        assert_eq!(range("5..40"), Ok((5, 40)));
        assert!(["40..5", "5..5", "5", "a..b", "-1..3"].iter().all(|text| range(text).is_err()));
    }
}
