"""Settings that must give the same result: batches, workers, order, interruptions, reuse."""
