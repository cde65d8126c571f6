//! Trains the adapter on the kept rows of the train split.
