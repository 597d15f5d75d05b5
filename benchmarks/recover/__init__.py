"""Accuracy kept at half and a third of the MACs: ResNet-20, trained on CIFAR-10, slimmed in many ways at equal cost.

Every way gets the same trained network, the same data and the same total cost, counted in epochs of the dense
network: ranking, supernet training, judging, the teacher's forwards and the final training all count. A training step
on one image costs three forwards. The final training of every way has the same settings and takes what is left.
5,000 training images are held out for searches; no test image is used before the last epoch is over.
"""
