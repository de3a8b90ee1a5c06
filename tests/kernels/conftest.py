import torch

# Small products: threads would only fight with the other processes of a test run.
torch.set_num_threads(1)
