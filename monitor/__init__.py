"""Weight norms, the partial convergence test, logs and figures."""
