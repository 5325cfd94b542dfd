"""`python -m training.demo --out DIR`."""

from training.demo.train import main

if __name__ == "__main__":
    main()
