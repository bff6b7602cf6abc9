"""The Triton kernels. Nothing else imports triton; `specproxy_kernels.dispatch` imports this package on demand."""
