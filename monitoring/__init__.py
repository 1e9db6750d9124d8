"""What winemon promises and watches, as numbers, and the rules that Prometheus evaluates for it."""
