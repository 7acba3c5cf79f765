"""The ops: public functions, their autograd, torch ops, fakes and choice of backend. One file tells one op's story."""
