"""Trees of draft tokens: their shape, the published ones, and the best one for measured accuracies. No torch."""
