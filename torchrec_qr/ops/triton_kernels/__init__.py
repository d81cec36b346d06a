"""The lookup and its backward as Triton kernels. Needs PyTorch and Triton only: no module here imports another of
``torchrec_qr``, so that the folder runs, and is measured, on a machine without FBGEMM and TorchRec.

- `launcher`: compiled forms of kernels, and their launches;
- `device_tables`: descriptors of tables, on the device;
- `id_rows`: from ids to rows of partitions, in a kernel;
- `forward`: outputs, and the gradient of the ids' weights;
- `occurrences`: which ids selected a row, in the order of rows;
- `sums`, `long_rows`: gradients of rows, summed over those ids;
- `steps`: one optimizer step per row;
- `launches`, `backward_launches`: the above in order.
"""
