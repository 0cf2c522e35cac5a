"""`megatron-cpt doctor`: what is wrong with the machines, the data and the model before a job is paid for."""
