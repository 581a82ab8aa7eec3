"""What has to hold in vLLM itself: run by `make serve-test`, in an environment that has vLLM."""
