"""The operations: what each public function takes and gives, which kernels serve it, and the way of a call."""
