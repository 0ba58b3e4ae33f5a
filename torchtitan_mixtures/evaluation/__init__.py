"""What a trained model over tokens is worth: likelihoods, retrieval, classification."""
