"""The operations of the model, one file each: plain-torch reference, public function, and the kernels of ``csrc/`` where built."""
